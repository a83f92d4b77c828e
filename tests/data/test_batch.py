import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.data.batch import NO_LABEL, PackedBatch, collate_pieces
from megatron_prolong.data.packed import Identity, PackedSequence, Piece


def piece(tokens: list[int], mask: list[int] | None = None) -> Piece:
    return Piece(np.array(tokens, np.uint32), None if mask is None else np.array(mask, np.uint8))


def labels_by_hand(document: Piece) -> list[int]:
    """The rules in words: next token of the document if it exists and its mask is 1."""
    count = len(document.tokens)
    return [
        int(document.tokens[place + 1])
        if place + 1 < count and (document.mask is None or document.mask[place + 1])
        else NO_LABEL
        for place in range(count)
    ]


documents = st.lists(
    st.integers(1, 12).flatmap(
        lambda count: st.tuples(
            st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count),
            st.none() | st.lists(st.integers(0, 1), min_size=count, max_size=count),
        )
    ).map(lambda pair: piece(*pair)),
    min_size=1,
    max_size=8,
)  # fmt: skip


@given(documents, st.integers(0, 9))
def test_labels_positions_and_boundaries_of_any_bag(bag: list[Piece], padding: int) -> None:
    used = sum(len(one.tokens) for one in bag)
    batch = collate_pieces(bag, used + padding)
    assert batch.tokens_T.tolist() == [int(token) for one in bag for token in one.tokens] + [0] * padding
    assert batch.labels_T.tolist() == [label for one in bag for label in labels_by_hand(one)] + (
        [NO_LABEL] * padding
    )
    lengths = [len(one.tokens) for one in bag] + [padding] * (padding > 0)
    assert batch.positions_T.tolist() == [place for length in lengths for place in range(length)]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]


@given(documents)
def test_the_order_of_documents_changes_no_pair_of_input_and_target(bag: list[Piece]) -> None:
    def pairs(batch: PackedBatch) -> list[tuple[int, int, int]]:
        return sorted(
            zip(
                batch.tokens_T.tolist(), batch.positions_T.tolist(), batch.labels_T.tolist(), strict=True
            )
        )  # fmt: skip

    assert pairs(collate_pieces(bag)) == pairs(collate_pieces(bag[::-1]))


def test_a_worked_example() -> None:
    packed = PackedSequence(
        tokens=np.array([5, 6, 7, 8, 9, 4], np.uint32),
        boundaries=np.array([0, 3, 5, 6]),
        mask=np.array([0, 0, 1, 1, 1, 1], np.uint8),
        identity=Identity("d", "s", 0),
    )
    batch = collate_pieces(packed.pieces(), 8)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 4, 0, 0]
    assert batch.labels_T.tolist() == [-100, 7, -100, 9, -100, -100, -100, -100]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8]
    assert [t.dtype for t in (batch.tokens_T, batch.labels_T, batch.positions_T)] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32


def test_an_idle_rank_gets_padding_without_loss() -> None:
    batch = collate_pieces([], 4)
    assert batch.labels_T.tolist() == [NO_LABEL] * 4 and batch.cu_seqlens.tolist() == [0, 4]
