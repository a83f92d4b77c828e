"""Where the samples of one domain of a mixture come from: a directory of MDS shards, or random tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import JsonValue

from megatron_prolong.data.packed import Identity, PackedSequence, open_tokens
from megatron_prolong.data.permutation import mix
from megatron_prolong.errors import UserError


class Domain(Protocol):
    name: str

    @property
    def contents(self) -> JsonValue:
        """What tells its samples from others, wherever they lie."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> PackedSequence: ...


class ShardedDomain:
    """Packed sequences of at most sequence_length tokens in a directory of MDS shards.

    vocab_size: tokens at or above it are refused; None reads them unchecked.
    Raises UserError for a missing or empty directory, and for what its first, middle and last sample show:
    wrong columns, packed for another length, tokens of another tokenizer. Others are checked as they are read.
    """

    def __init__(
        self, directory: Path, *, sequence_length: int, vocab_size: int | None, loss_mask: bool
    ) -> None:
        self.name = str(directory)
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._loss_mask = loss_mask
        self._reader = open_tokens(directory, *(["mask"] if loss_mask else []))
        self.tokenizer = self._reader.tokenizer
        if not len(self._reader):
            raise UserError(f"{directory}: no samples; pack a source into it, or leave it out of the mixture")
        self._refuse_other_lengths([self.read(index) for index in {0, len(self) // 2, len(self) - 1}])

    def _refuse_other_lengths(self, sequences: Iterable[PackedSequence]) -> None:
        """Packs may be somewhat shorter than the stage; but with 64K packs in a 512K stage a batch would hold an
        eighth of its tokens, and nothing long."""
        longest = max(sequences, key=lambda sequence: sequence.num_tokens)
        if 2 * longest.num_tokens <= self._sequence_length:
            raise UserError(
                f"{longest.identity}: {longest.num_tokens} tokens, not even half of the stage's sequence_length "
                f"{self._sequence_length}; batches would be as much smaller. Pack the source again with "
                f"`prolong data pack --length {self._sequence_length}`"
            )

    @property
    def contents(self) -> JsonValue:
        """Sizes and hashes of the shards before compression, as the index has them; nothing is read."""
        return [
            [shard.num_samples, shard.raw.num_bytes, dict(shard.raw.hashes)] for shard in self._reader.shards
        ]

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> PackedSequence:
        """Sample `index` of the directory, copied out of its shard."""
        identity = Identity.of(self._reader, index)
        sequence = PackedSequence.from_sample(self._reader[index], identity, loss_mask=self._loss_mask)
        if sequence.num_tokens > self._sequence_length:
            raise UserError(
                f"{identity}: {sequence.num_tokens} tokens, but the stage's sequence_length is "
                f"{self._sequence_length}; a stage reads packs of its own length, so pack the source again "
                f"with `prolong data pack --length {self._sequence_length}`"
            )
        if self._vocab_size is not None:
            check_vocabulary(sequence, self._vocab_size)
        return sequence


def check_vocabulary(sequence: PackedSequence, vocab_size: int) -> None:
    """Refuse tokens the model has no embedding for."""
    if sequence.tokens.max() >= vocab_size:
        position = int(np.argmax(sequence.tokens >= vocab_size))
        raise UserError(
            f"{sequence.identity}: token {sequence.tokens[position]} at position {position} is not in the "
            f"vocabulary of {vocab_size}; tokenize the data with the model's own tokenizer"
        )


class MockDomain:
    """One document of random tokens per sample, for speed tests. Only the word `mock` asks for it."""

    name = "mock"

    def __init__(self, size: int, *, sequence_length: int, vocab_size: int, seed: int) -> None:
        self._size = size
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._seed = seed

    @property
    def contents(self) -> JsonValue:
        """Its size: the seed is the stage's."""
        return self._size

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> PackedSequence:
        generator = np.random.default_rng(mix(self._seed, index))
        return PackedSequence(
            tokens=generator.integers(self._vocab_size, size=self._sequence_length, dtype=np.uint32),
            boundaries=np.array([0, self._sequence_length], np.int64),
            mask=None,
            identity=Identity(self.name, "-", index),
        )
