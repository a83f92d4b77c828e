"""Where a stage stands: its position in the batch stream, and what a run that goes on must remember of its past."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.recipe.schema import Stage
from megatron_prolong.training.step import StepMetrics

LOSS_WINDOW = 50


@dataclass(frozen=True)
class TrainState:
    """Progress inside one stage; saved with every checkpoint.

    Attributes:
        step: updates made (skipped ones included); also the position in the batch stream.
        tokens: tokens consumed by the stage.
        skipped: steps whose update was left out: they had no targets, a non-finite loss or gradient, or
            the recipe passes them over.
        skipped_in_a_row: of them, the last ones, those that the recipe passes over not counted.
        recent_losses: of the last LOSS_WINDOW steps that made an update. In the checkpoint, so that a run that goes
            on judges a step as one that was never stopped (training/guard.py).
        usual_loss: their median where it was lowest; a loss that climbs slowly does not become the usual one.
        domain_tokens: tokens consumed by domain.
        stream: fingerprint of the batch stream; a resume on another stream is refused.
    """

    stage: str
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    usual_loss: float | None = None
    domain_tokens: dict[str, int] = field(default_factory=dict)
    stream: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def after(self, stage: Stage, sequences: Sequence[PackedSequence], metrics: StepMetrics) -> TrainState:
        """The state behind one more step, with its global batch."""
        domains, names = Counter(self.domain_tokens), stage.domain_names
        for sequence in sequences:
            domain = sequence.identity.domain
            domains[names.get(domain, domain)] += sequence.num_tokens
        recent, usual = (
            [*self.recent_losses, *[metrics.loss] * metrics.updated][-LOSS_WINDOW:],
            self.usual_loss,
        )
        if len(recent) == LOSS_WINDOW:
            median = statistics.median(recent)
            usual = median if usual is None else min(usual, median)
        return dataclasses.replace(
            self,
            step=self.step + 1,
            tokens=domains.total(),
            skipped=self.skipped + (not metrics.updated),
            skipped_in_a_row=0 if metrics.updated else self.skipped_in_a_row + metrics.wanted,
            recent_losses=recent,
            usual_loss=usual,
            domain_tokens=dict(domains),
        )
