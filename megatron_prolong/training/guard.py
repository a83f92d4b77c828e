"""Numerical guards: skipped steps are counted, and a run that goes wrong stops with its data named."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.training.step import StepMetrics

MAX_SKIPS_IN_A_ROW = 5
SPIKE_WINDOW = 50  # steps that make up "the usual loss"
# Mixtures differ by less than a nat from step to step; three is a broken batch or a broken run.
SPIKE_NATS = 3.0


class Guard:
    """Watches the losses of one stage.

    One non-finite step leaves the weights alone (training/step.py) and is forgiven; several in a row, or a finite
    loss far above the usual one, end the run before a checkpoint can be overwritten with damage.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._skips = 0
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def check(self, metrics: StepMetrics, sequences: Sequence[PackedSequence]) -> None:
        """Raises UserError, naming the samples of the step, when the run should not go on."""
        if not metrics.updated:
            self._skips += 1
            if self._skips >= MAX_SKIPS_IN_A_ROW:
                self._stop(f"{self._skips} steps in a row had a non-finite loss or gradient", sequences)
            return
        self._skips = 0
        if len(self._recent) == SPIKE_WINDOW and metrics.loss > statistics.median(self._recent) + SPIKE_NATS:
            self._stop(
                f"loss {metrics.loss:.2f}, the median of the last {SPIKE_WINDOW} steps is "
                f"{statistics.median(self._recent):.2f}",
                sequences,
            )
        self._recent.append(metrics.loss)

    def _stop(self, what: str, sequences: Sequence[PackedSequence]) -> None:
        names = sorted({str(sequence.identity) for sequence in sequences})
        raise UserError.many(
            f"stage {self._stage}: {what}; look at the batch (prolong data inspect), lower lr, or start again "
            "from the last checkpoint. The step's samples:",
            names,
        )
