"""Domains mixed in fixed proportions: which samples make up the global batch of every step.

`Mixture.batch(step)` is a pure function of (proportions, sizes of the domains, seed, step). It does not
know of ranks, workers or earlier steps, so resuming at any step or changing the data-parallel size
continues the same stream, and costs O(batch).

- Which domain: `data/interleave.py` keeps every prefix of the run within one sample of the proportions.
  Only the order inside a global batch is shuffled, so this holds after every step.
- Which sample: the n-th draw from a domain of m samples is the (n mod m)-th of epoch n // m, and every
  epoch is its own permutation. Nothing is seen twice before all has been seen once.
- Domains are told apart by their place in the recipe, not by their path: moving data to another disk
  keeps the stream. `fingerprint` tells whether two mixtures have the same stream of the same samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_prolong.data.domain import Domain, MockDomain, ShardedDomain
from megatron_prolong.data.interleave import Interleave
from megatron_prolong.data.mds import common_tokenizer, is_there, is_unpacked_by_all, read_index
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.data.permutation import Permutation
from megatron_prolong.errors import PassingError, UserError
from megatron_prolong.recipe.schema import Stage
from megatron_prolong.runtime.passing import patiently


@dataclass(frozen=True)
class SampleRef:
    """One sequence of a global batch: number of its domain, sample in the domain."""

    domain: int
    index: int


@dataclass(frozen=True)
class DomainUse:
    """What a run takes from one domain. epochs: how often each of its samples is seen on average."""

    name: str
    proportion: float
    num_samples: int
    num_draws: int

    @property
    def epochs(self) -> float:
        return self.num_draws / self.num_samples


class Mixture:
    """The stream of global batches of one stage.

    domains: directory of MDS shards → proportion, in any unit; or the word "mock" for random tokens.
    sequence_length: tokens of a packed sequence. batch_sequences: sequences of a global batch.
    loss_mask: read the mask column (instruction data). vocab_size: of the model; needed for "mock", and
    otherwise lets tokens beyond it be refused as they are read. `tokenizer`: fingerprint of the one that made the
    tokens; None where no domain records it.
    Raises UserError naming every domain that cannot be used, or two whose tokenizers differ.
    """

    def __init__(
        self,
        domains: Mapping[Path, float] | Mapping[str, float] | Literal["mock"],
        *,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        num_steps: int,
        loss_mask: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        assert batch_sequences > 0 and num_steps > 0
        self.batch_sequences = batch_sequences
        self.num_steps = num_steps
        self.seed = seed
        num_slots = batch_sequences * num_steps
        self._domains: Sequence[Domain]
        self.tokenizer: str | None = None
        if domains == "mock":
            assert vocab_size is not None, "random tokens need a vocabulary size"
            self.proportions = [1.0]
            self._domains = [
                MockDomain(num_slots, sequence_length=sequence_length, vocab_size=vocab_size, seed=seed)
            ]
        else:
            self.proportions = list(domains.values())
            opened = _open(domains, sequence_length, vocab_size, loss_mask)
            self.tokenizer = common_tokenizer({domain.name: domain.tokenizer for domain in opened})
            self._domains = opened
        self._interleave = Interleave(self.proportions, num_slots)

    @classmethod
    def of_stage(cls, stage: Stage, vocab_size: int | None = None) -> Mixture:
        """What the stage of a recipe trains on."""
        return cls(
            stage.mixture,
            sequence_length=stage.sequence_length,
            batch_sequences=stage.batch_sequences,
            seed=stage.seed,
            num_steps=stage.num_steps,
            loss_mask=stage.loss_mask,
            vocab_size=vocab_size,
        )

    def batch(self, step: int) -> list[SampleRef]:
        """The batch_sequences samples of a step."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a run of {self.num_steps} steps")
        first = step * self.batch_sequences
        order = Permutation(self.batch_sequences, self.seed, step)
        return [self._draw(first + order[place]) for place in range(self.batch_sequences)]

    def _draw(self, slot: int) -> SampleRef:
        domain, draw = self._interleave[slot]
        size = len(self._domains[domain])
        epoch, position = divmod(draw, size)
        return SampleRef(domain, Permutation(size, self.seed, domain, epoch)[position])

    def read(self, ref: SampleRef) -> PackedSequence:
        """The sample's tokens. Raises UserError naming directory, shard and sample when they are unusable."""
        return self._domains[ref.domain].read(ref.index)

    def usage(self) -> list[DomainUse]:
        """What the whole run draws from each domain, and so how often it repeats it."""
        num_slots = self._interleave.num_slots
        total = sum(self.proportions)
        return [
            DomainUse(domain.name, share / total, len(domain), self._interleave.count(number, num_slots))
            for number, (domain, share) in enumerate(zip(self._domains, self.proportions, strict=True))
        ]

    def summary(self) -> str:
        """One line for a log: share of every domain, and how often the run repeats it."""
        return "; ".join(
            f"{use.name} {use.proportion:.1%}, {use.epochs:.3g} epochs ({use.num_draws:,} draws of "
            f"{use.num_samples:,} samples)"
            for use in self.usage()
        )

    def fingerprint(self) -> str:
        """Equal for two mixtures exactly when their batches are the same samples at every common step."""
        contents = [domain.contents for domain in self._domains]
        shares = [str(share) for share in self._interleave.shares]
        facts = [shares, contents, self.batch_sequences, self.seed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_shards(stages: Iterable[Stage]) -> list[str]:
    """Look for every shard that the stages read: a step may ask for it first after hours, a later stage after days.

    One process is enough, which asks the file server about each. Returns warnings, of data that would be read
    slowly. Raises UserError naming every directory that lacks some, as after a download that was stopped.
    """
    mixtures = [stage.mixture for stage in stages if stage.mixture != "mock"]
    problems, warnings = [], []
    for directory in dict.fromkeys(directory for mixture in mixtures for directory in mixture):
        shards = read_index(directory).shards
        if gone := [shard.delivered[0] for shard in shards if not is_there(shard)]:
            problems.append(
                f"{directory}: {len(gone):,} of its {len(shards):,} shards are missing, or have another size than "
                f"in index.json, such as {gone[0]}"
            )
        if any(map(is_unpacked_by_all, shards)):
            warnings.append(
                f"{directory}: its shards are compressed and nothing may be written beside them, so every rank "
                "will unpack a whole one for nearly every sample, and keep 64 in its temporary directory; copy "
                "them to where you may write, and unpack them by `prolong data verify`"
            )
    if problems:
        raise UserError.many("data is not there as a whole; fetch or write it again:", problems)
    return warnings


def _open(
    domains: Collection[Path | str],
    sequence_length: int,
    vocab_size: int | None,
    loss_mask: bool,
) -> list[ShardedDomain]:
    """Open every domain, and report all that cannot be used at once."""
    opened, problems = [], []
    for directory in domains:
        try:
            domain = partial(
                ShardedDomain, Path(directory), sequence_length=sequence_length, vocab_size=vocab_size,
                loss_mask=loss_mask,
            )  # fmt: skip
            opened.append(patiently(domain, f"opening {directory}"))
        except PassingError:
            raise
        except UserError as error:
            problems.append(str(error))
    if not domains:
        problems.append("it names no directory")
    if problems:
        raise UserError.many("the mixture cannot be read:", problems)
    return opened
