"""A packed sequence: a fixed number of tokens holding whole or cut documents, with their boundaries.

On disk it is one MDS sample with the columns of ProLong's published data: `input_ids` uint32 [S],
`indices` uint32 [D, 2] (start and end of every document, in order, without gaps; absent means one
document) and, for instruction data, `mask` [S], integers (0 = this token is no training target).
Only numpy lives here; `data/batch.py` turns packed sequences into the tensors of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSReader
from megatron_prolong.errors import UserError


@dataclass(frozen=True)
class Identity:
    """Where a sample lies: the data set's directory, the shard's file name, the sample's number in it all."""

    domain: str
    shard: str
    index: int

    @classmethod
    def of(cls, reader: MDSReader, index: int) -> Identity:
        """Of sample `index` >= 0 of a data set."""
        return cls(str(reader.path), reader.shard_of(index).raw.basename, index)

    def __str__(self) -> str:
        return f"{self.domain}, shard {self.shard}, sample {self.index}"


def open_tokens(directory: Path | str, *columns: str) -> MDSReader:
    """A data set's `input_ids` and, where they are there, `indices` and `columns`; others are passed over.

    Raises UserError when it has samples without tokens.
    """
    reader = MDSReader(directory, columns=("input_ids", "indices", *columns))
    if reader.shards and "input_ids" not in reader.columns:
        known = ", ".join(reader.shards[0].columns)
        raise UserError(f"{directory}: no column input_ids, only {known}; tokenize it first")
    return reader


def check_tokens(tokens: NDArray[Any], identity: Identity) -> None:
    """Raises UserError when these are no uint32 [S]."""
    if tokens.ndim != 1 or tokens.dtype != np.uint32:
        raise UserError(
            f"{identity}: input_ids must be uint32 [S], found {tokens.dtype} {list(tokens.shape)}"
        )


class Piece(NamedTuple):
    """The part of one document that lies in one packed sequence.

    tokens: uint32 [n]. mask: uint8 [n], 1 where the token may be a training target; None means everywhere.
    """

    tokens: NDArray[np.uint32]
    mask: NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """S tokens of D documents.

    tokens: uint32 [S]. boundaries: int64 [D+1], strictly increasing from 0 to S (cu_seqlens).
    mask: uint8 [S] of zeros and ones, or None when every token may be a target.
    Raises UserError naming the sample when there are no tokens.
    """

    tokens: NDArray[np.uint32]
    boundaries: NDArray[np.int64]
    mask: NDArray[np.uint8] | None
    identity: Identity

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise UserError(f"{self.identity}: input_ids is empty; pack the data set again")
        edges = self.boundaries  # what comes from a file was judged by from_sample
        assert self.tokens.dtype == np.uint32 and self.tokens.ndim == 1
        assert edges.dtype == np.int64 and edges[0] == 0 and edges[-1] == len(self.tokens)
        assert (np.diff(edges) > 0).all()
        assert self.mask is None or (self.mask.dtype == np.uint8 and self.mask.shape == self.tokens.shape)

    @classmethod
    def from_sample(
        cls, sample: Mapping[str, Any], identity: Identity, *, loss_mask: bool = False
    ) -> PackedSequence:
        """Read one MDS sample; the arrays are copied, so that nothing refers to the file afterwards.

        loss_mask: read the `mask` column, which must then be there; otherwise it is ignored.
        Raises UserError naming directory, shard and sample.
        """
        if loss_mask and "mask" not in sample:
            raise UserError(
                f"{identity}: no column mask, but the stage has `loss_mask: true`; "
                "tokenize the chats with `--kind chat`, or set loss_mask: false"
            )
        tokens = np.array(sample["input_ids"])
        check_tokens(tokens, identity)
        mask = read_mask(sample["mask"], len(tokens), identity) if loss_mask else None
        boundaries = read_boundaries(sample.get("indices"), len(tokens), identity)
        return cls(tokens, boundaries, mask, identity)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.boundaries) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document in this sequence, int64 [D]."""
        return np.diff(self.boundaries)

    def piece(self, document: int) -> Piece:
        """One document, as views."""
        part = slice(self.boundaries[document], self.boundaries[document + 1])
        return Piece(self.tokens[part], None if self.mask is None else self.mask[part])

    def pieces(self) -> Iterator[Piece]:
        """The documents one by one."""
        return map(self.piece, range(self.num_documents))


def read_mask(stored: Any, num_tokens: int, identity: Identity) -> NDArray[np.uint8]:
    """1 where the column `mask` is not 0, which is all that ProLong's collator asks; a copy, uint8 [num_tokens].

    datatools' `pack` writes masks of uint32, and into them the ids of the tokens that it adds.
    Raises UserError when it is no array of num_tokens integers.
    """
    mask = np.asarray(stored)
    if mask.dtype.kind not in "iu" or mask.shape != (num_tokens,):
        raise UserError(
            f"{identity}: mask must be integers [{num_tokens}] like input_ids, "
            f"found {mask.dtype} {list(mask.shape)}; tokenize it again"
        )
    return (mask != 0).view(np.uint8)


def read_boundaries(indices: Any, num_tokens: int, identity: Identity) -> NDArray[np.int64]:
    """cu_seqlens, int64 [D+1], of ProLong's [start, end) spans; None is one document.

    Empty spans vanish. Raises UserError when the spans do not cover the tokens without gap or overlap.
    """
    if indices is None:
        return np.array([0, num_tokens], dtype=np.int64)
    spans = np.asarray(indices)
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise UserError(f"{identity}: indices must be [documents, 2], found {list(spans.shape)}")
    spans = spans.astype(np.int64)
    spans = spans[spans[:, 0] != spans[:, 1]]
    edges = np.concatenate([[0], spans[:, 1]])
    wrong = np.flatnonzero((spans[:, 0] != edges[:-1]) | (spans[:, 1] < spans[:, 0]))
    if len(wrong):
        start, end = spans[wrong[0]]
        raise UserError(
            f"{identity}: span [{start}, {end}) of indices does not follow on the one before, "
            f"which ends at {edges[wrong[0]]}; documents must cover the sequence without gap or overlap"
        )
    if edges[-1] != num_tokens:
        raise UserError(f"{identity}: indices end at {edges[-1]}, the sequence has {num_tokens} tokens")
    return edges
