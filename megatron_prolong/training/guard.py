"""Numerical guards: skipped steps are counted, and a run that goes wrong stops with its data named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.training.state import LOSS_WINDOW, TrainState
from megatron_prolong.training.step import StepMetrics

# Single steps are forgiven: with clipped gradients one odd batch does little harm, and a restart meets it again.
BAD_IN_A_ROW = 5
# Mixtures differ by less than a nat from step to step; three is a broken batch or a broken run.
SPIKE_NATS = 3.0


def check(state: TrainState, metrics: StepMetrics, sequences: Sequence[PackedSequence]) -> None:
    """Judge a step by those before it, of which `state` tells.

    A step without a finite loss and gradient leaves the weights alone (training/step.py). Several such in a row, or
    several with a loss far above the usual one, end the run.

    Raises:
        UserError: the run should not go on; names the samples of the step.
    """
    if not metrics.wanted:
        return
    if not metrics.updated:
        if (skips := state.skipped_in_a_row + 1) >= BAD_IN_A_ROW:
            _stop(
                state, f"{skips} steps in a row had no targets, or a non-finite loss or gradient", sequences
            )
    elif state.usual_loss is not None:
        usual = state.usual_loss
        latest = [*state.recent_losses[1 - BAD_IN_A_ROW :], metrics.loss]
        if min(latest) > usual + SPIKE_NATS:
            _stop(
                state,
                f"loss {metrics.loss:.2f}, and {BAD_IN_A_ROW} steps in a row more than {SPIKE_NATS:g} above "
                f"{usual:.2f}, the lowest median of {LOSS_WINDOW} steps",
                sequences,
            )


def _stop(state: TrainState, what: str, sequences: Sequence[PackedSequence]) -> NoReturn:
    names = sorted({str(sequence.identity) for sequence in sequences})
    raise UserError.many(
        f"stage {state.stage}: {what}; look at the batch (prolong data inspect), lower lr, or pass these "
        "steps over (the stage's skip_steps), and start again. The step's samples:",
        names,
    )
