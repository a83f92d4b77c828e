"""The document lengths of a stage's global batches: from its shards if they are there, else from what is known.

In this order, per stage: the real mixture's batches (`data.mixture`, exactly those that training would see);
the published distribution of a domain of that name (`lengths`), or the length in the name; one document per
sequence, the dearest there is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_prolong.data.interleave import Interleave
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.plan.lengths import (
    PROLONG_64K,
    PROLONG_512K,
    PROLONG_SFT,
    BatchDocuments,
    DomainLengths,
    LengthMixture,
    Lengths,
    single_document,
)
from megatron_prolong.recipe.schema import Stage

_KNOWN = (PROLONG_64K, PROLONG_512K, PROLONG_SFT)


@dataclass(frozen=True)
class Batches:
    """Some global batches of a stage.

    Attributes:
        lengths: for every step, for every packed sequence, its documents' tokens.
        source: where they come from, for the reader.
    """

    lengths: list[list[Lengths]]
    source: str

    @property
    def documents(self) -> list[BatchDocuments]:
        """Of every step, as the time model wants them."""
        return [BatchDocuments.of(step) for step in self.lengths]


def stage_batches(stage: Stage, num_steps: int) -> Batches:
    """`num_steps` global batches of the stage: its first ones if the shards are there.

    Raises:
        UserError: the shards are there but cannot be read.
    """
    num_steps = min(num_steps, stage.num_steps)
    if stage.mixture != "mock" and all(path.is_dir() for path in stage.mixture):
        return Batches(_real(stage, num_steps), f"{num_steps} batches of the stage's own shards")
    mixture, source = _assumed(stage)
    return Batches(_drawn(mixture, stage, num_steps), f"{num_steps} batches drawn from {source}")


def _real(stage: Stage, num_steps: int) -> list[list[Lengths]]:
    mixture = Mixture.of_stage(stage)
    return [[mixture.read(ref).document_lengths for ref in mixture.batch(step)] for step in range(num_steps)]


def _drawn(mixture: LengthMixture, stage: Stage, num_steps: int) -> list[list[Lengths]]:
    """Domains in the order that the real mixture would have them, every batch close to the proportions."""
    order = Interleave([domain.proportion for domain in mixture.domains], stage.batch_sequences * num_steps)
    batches = []
    for step in range(num_steps):
        rng = np.random.default_rng([stage.seed, step])
        slots = range(step * stage.batch_sequences, (step + 1) * stage.batch_sequences)
        domains = [mixture.domains[order[slot][0]] for slot in slots]
        batches.append([domain.draw(rng, stage.sequence_length) for domain in domains])
    return batches


def _assumed(stage: Stage) -> tuple[LengthMixture, str]:
    """Known distributions by directory name; whole sequences where the name is unknown."""
    if stage.mixture == "mock":
        return single_document(stage.sequence_length), "mock data: one document per sequence"
    domains, unknown = [], []
    for path, proportion in stage.mixture.items():
        known = _find(path, stage.sequence_length)
        if known is None:
            unknown.append(path.name)
            known = DomainLengths(path.name, proportion, document_tokens=stage.sequence_length)
        domains.append(replace(known, proportion=proportion))
    source = "published document lengths (no shards here)"
    if unknown:
        source += f"; one document per sequence assumed for {', '.join(unknown)}"
    return LengthMixture(stage.name, stage.sequence_length, tuple(domains)), source


def _find(path: Path, sequence_length: int) -> DomainLengths | None:
    """The published domain of that directory name, preferably of the same sequence length; or what the name says.

    ProLong's convention: `books-65536` holds documents of 65,536 tokens.
    """
    by_length = sorted(_KNOWN, key=lambda mixture: mixture.sequence_length != sequence_length)
    known = next((d for mixture in by_length for d in mixture.domains if d.name == path.name), None)
    if known is None and (suffix := re.search(r"-([1-9]\d{2,})$", path.name)):
        return DomainLengths(path.name, 1.0, document_tokens=int(suffix[1]))
    return known
