"""Rank slices of packed sequences: every token exactly once, Transformer Engine's layout, balanced work."""

from __future__ import annotations

import weakref
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prolong.model.context_plan import ContextPlan, zigzag_order
from tests.model.dense import gather

CPU = torch.device("cpu")
plans = st.builds(
    lambda lengths, cp, multiple, threshold: ContextPlan.build(
        [0, *accumulate(lengths)], cp_size=cp, multiple=multiple, split_threshold_tokens=threshold
    ),
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4, 3]),
    st.sampled_from([0, 1, 10, 30, 1000]),
)


@settings(max_examples=200)
@given(plan=plans)
def test_every_token_is_on_exactly_one_rank(plan):
    tokens = torch.arange(plan.num_tokens)
    slices = [plan.take(tokens, rank, -1) for rank in range(plan.cp_size)]
    held = torch.cat(slices)
    assert torch.equal(held[held >= 0].sort().values, tokens)
    assert torch.equal(gather(plan, slices), tokens)
    for rank, part in enumerate(slices):
        assert len(part) == plan.slice_length(rank) > 0 and len(part) % plan.multiple == 0


@settings(max_examples=100)
@given(plan=plans)
def test_split_documents_lie_in_zigzag_chunks(plan):
    """Transformer Engine's definition as it is said: pad, cut in 2·cp, take chunks r and 2·cp-1-r."""
    cp = plan.cp_size
    assert plan.cu_seqlens_padded[-1] == cp * plan.split_tokens
    padded_documents = []
    for span in plan.split:
        padding = -(span.stop - span.start) % (2 * cp)
        padded_documents.append(torch.cat([torch.arange(*span), torch.full((padding,), -1)]))
    assert plan.cu_seqlens_padded == (0, *accumulate(len(document) for document in padded_documents))
    for rank in range(cp):
        expected = [d.view(2 * cp, -1)[[rank, 2 * cp - 1 - rank]].flatten() for d in padded_documents]
        part = plan.take(torch.arange(plan.num_tokens), rank, -1)[: plan.split_tokens]
        assert torch.equal(part, torch.cat([*expected, torch.empty(0, dtype=torch.int64)]))


@settings(max_examples=100)
@given(plan=plans)
def test_local_documents_are_whole_and_in_order(plan):
    tokens = torch.arange(plan.num_tokens)
    for rank in range(plan.cp_size):
        part, bounds = plan.take(tokens, rank, -1), plan.local_cu_seqlens(rank)
        assert bounds[0] == plan.split_tokens and len(bounds) == len(plan.local[rank]) + 1
        assert list(plan.local[rank]) == sorted(plan.local[rank])
        for span, start, stop in zip(plan.local[rank], bounds, bounds[1:], strict=False):
            assert torch.equal(part[start:stop], torch.arange(*span))
        assert (part[bounds[-1] :] == -1).all()


def test_threshold_divides_short_from_long():
    lengths = [9, 10, 11, 3]
    plan = ContextPlan.build([0, *accumulate(lengths)], cp_size=2, split_threshold_tokens=10)
    assert [span.stop - span.start for span in plan.split] == [10, 11]
    assert sorted(span for documents in plan.local for span in documents) == [(0, 9), (30, 33)]
    assert not ContextPlan.build([0, 9, 99], cp_size=2).local[0], "threshold 0 splits all"
    assert not ContextPlan.build([0, 9, 99], cp_size=1).split, "one rank has nobody to split with"


def test_one_rank_holds_the_pack_as_it_is():
    plan = ContextPlan.build([0, 5, 6, 13], cp_size=1, multiple=4)
    tokens = torch.arange(100, 116)  # three tokens behind the last document
    assert plan.take(tokens, 0, 7).tolist() == [*range(100, 113), 7, 7, 7]
    assert plan.local_cu_seqlens(0) == (0, 5, 6, 13)


def test_whole_documents_lie_where_they_are_dealt():
    """The others are no matter of the dealer's; without one, each goes where there are fewest tokens."""
    boundaries = [0, 300, 400, 450, 1450, 1500]
    plan = ContextPlan.build(boundaries, cp_size=2, split_threshold_tokens=1000, owners=[1, 0, 1, 0])
    assert plan.split == ((450, 1450),)
    assert plan.local == (((300, 400), (1450, 1500)), ((0, 300), (400, 450)))
    dealt = ContextPlan.build(boundaries, cp_size=2, split_threshold_tokens=1000)
    assert dealt.local == (((0, 300),), ((300, 400), (400, 450), (1450, 1500)))


def test_neighbours_slices_are_a_zigzag_slice_of_longer_chunks():
    plan = ContextPlan.build([0, 48, 64], cp_size=4)
    coarse = ContextPlan.build([0, 48, 64], cp_size=2)
    tokens = torch.arange(64)
    for outer in range(2):
        neighbours = torch.cat([plan.take(tokens, 2 * outer + inner, -1) for inner in range(2)])
        ordered = neighbours[zigzag_order(plan.chunk_tokens, 2, CPU)]
        assert torch.equal(ordered, coarse.take(tokens, outer, -1))
    everyone = torch.cat([plan.take(tokens, rank, -1) for rank in range(4)])
    assert torch.equal(everyone[zigzag_order(plan.chunk_tokens, 4, CPU)], tokens)


def test_the_orders_of_past_packs_are_let_go():
    """On a GPU each is 8 bytes for every token of the whole pack."""
    orders = [weakref.ref(zigzag_order((tokens,), 2, CPU)) for tokens in range(1, 20)]
    assert sum(order() is not None for order in orders) < 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_padding_value_and_trailing_axes(dtype):
    plan = ContextPlan.build([0, 3], cp_size=2)
    part = plan.take(torch.ones(3, 2, dtype=dtype), 0, -100)
    assert part.dtype == dtype and part.tolist() == [[1, 1], [-100, -100]]
