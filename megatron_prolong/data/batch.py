"""From packed sequences to the tensors of one micro-batch.

A micro-batch is any bag of documents laid end to end, whichever were dealt to the rank; the labels do not depend
on the company:

- the label of a token is the next token of the same document;
- the last token of each document has none, so no loss is taken across a boundary, the first token of a
  document is never a target, and a document of one token gives no loss;
- a target whose mask is 0 has none, nor has padding.

ProLong's collator marks the first token of each span and lets the model shift; that is the same set of
(input, target) pairs. Padding is a document of its own, so it is attended by nothing but itself.

Shape suffixes: T tokens of the micro-batch. D documents, padding counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prolong.data.packed import Piece

NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """T tokens of D documents.

    tokens_T: int64. labels_T: int64, NO_LABEL (-100) where no loss is taken.
    positions_T: int64, restarting at 0 in each document. cu_seqlens: int32 [D+1] from 0 to T.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        shape = self.tokens_T.shape
        assert len(shape) == 1 and self.labels_T.shape == shape and self.positions_T.shape == shape
        assert self.cu_seqlens.dtype == torch.int32 and self.cu_seqlens.ndim == 1


def collate_pieces(pieces: Iterable[Piece], num_tokens: int | None = None) -> PackedBatch:
    """A bag of documents laid end to end, padded to num_tokens when given.

    No document at all with num_tokens given is all padding: what an idle rank computes.
    """
    pieces = list(pieces)
    used = sum(len(piece.tokens) for piece in pieces)
    total = used if num_tokens is None else num_tokens
    assert total > 0 and used <= total, f"{used} tokens of documents do not fit {num_tokens}"

    lengths = np.array([len(piece.tokens) for piece in pieces] + [total - used] * (total > used), np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.zeros(total, np.int64)
    is_target = np.zeros(total, bool)
    for piece, start, end in zip(pieces, starts[: len(pieces)], ends[: len(pieces)], strict=True):
        tokens[start:end] = piece.tokens
        is_target[start:end] = True if piece.mask is None else piece.mask != 0
    is_target[starts] = False

    labels = np.full(total, NO_LABEL, np.int64)
    labels[:-1] = np.where(is_target[1:], tokens[1:], NO_LABEL)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        positions_T=torch.from_numpy(np.arange(total) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
    )
