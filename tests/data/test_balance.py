"""The balance of a global batch: nothing lost, nothing too big, and no rank waiting where arithmetic allows."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance.fit import fit
from benchmarks.balance.schemes import outcome_of
from megatron_prolong.data.balance import CostModel, assign, threshold
from megatron_prolong.data.balance.micro_batches import fill_alike, fill_even
from megatron_prolong.data.balance.threshold import NEVER, best_share
from megatron_prolong.data.batch import collate_pieces
from megatron_prolong.data.packed import Identity, PackedSequence, Piece
from megatron_prolong.errors import UserError
from megatron_prolong.mcore.groups import Axis, ParallelGroups
from megatron_prolong.mcore.micro_batch import micro_batch
from megatron_prolong.model.context_plan import ContextPlan
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.training.balance import micro_batches, share_out
from tests.plan.plan_shapes import LLAMA3_8B

COST = CostModel(linear=1.0, quadratic=1 / 2_000, exchange=0.02)

# Lengths from one token to a whole sequence of 512, in a few packed sequences.
documents = st.lists(st.integers(1, 512), min_size=1, max_size=30)
batches = st.lists(documents.map(lambda lengths: np.array(lengths, dtype=np.int64)), min_size=1, max_size=6)
layouts = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.booleans())


def lengths_of(plan, batch):
    return np.array([batch[index.sample][index.document] for index in plan.documents], dtype=np.int64)


def budget_of(cp, extra):
    """Room for the longest possible document (512 tokens) and a bit."""
    return 512 // cp + extra


@settings(max_examples=60)
@given(batch=batches, layout=layouts, extra=st.integers(0, 300))
def test_every_document_exactly_once_within_the_budget(batch, layout, extra):
    dp, cp, equal = layout
    budget = budget_of(cp, extra)
    assignment = assign(batch, dp=dp, cp=cp, budget_tokens=budget, cost=COST, equal_micro_batches=equal)
    assert len(assignment) == dp
    placed = [index for plans in assignment for plan in plans for index in plan.documents]
    assert sorted(placed) == [(s, d) for s, lengths in enumerate(batch) for d in range(len(lengths))]
    for plans in assignment:
        assert plans, "a rank without documents still takes part in the step, with an empty micro-batch"
        for plan in plans:
            assert list(plan.documents) == sorted(plan.documents)
            assert plan.share.max_tokens <= budget
        seconds = [plan.share.seconds for plan in plans]
        assert seconds == sorted(seconds, reverse=True), "ranks are at the dearest at the same time"
    if equal:
        assert len({len(plans) for plans in assignment}) == 1


@settings(max_examples=60)
@given(batch=batches, layout=layouts, extra=st.integers(0, 300))
def test_the_model_agrees_with_the_slices_the_engine_makes(batch, layout, extra):
    """Tokens and work of every context-parallel rank, as ContextPlan lays the micro-batch out."""
    dp, cp, equal = layout
    assignment = assign(
        batch, dp=dp, cp=cp, budget_tokens=budget_of(cp, extra), cost=COST, equal_micro_batches=equal
    )
    for plan in (plan for plans in assignment for plan in plans if plan.documents):
        lengths = lengths_of(plan, batch)
        engine = ContextPlan.build(
            [0, *np.cumsum(lengths).tolist()],
            cp_size=cp,
            split_threshold_tokens=plan.share.split_threshold_tokens,
            owners=plan.share.owners,
        )
        assert plan.share.max_tokens == max(engine.slice_length(rank) for rank in range(cp))
        split = np.array([span.stop - span.start for span in engine.split], dtype=np.int64)
        local = [
            COST.work(np.array([span.stop - span.start for span in spans], dtype=np.int64)).sum()
            for spans in engine.local
        ]
        seconds = COST.work(split).sum() / cp + COST.exchange_time(split.sum(), cp) + max(local)
        assert plan.share.seconds == pytest.approx(seconds, rel=1e-9)  # the order of additions differs


@settings(max_examples=30)
@given(batch=batches, layout=layouts)
def test_the_same_on_every_rank_and_in_every_run(batch, layout):
    dp, cp, equal = layout
    first, second = (
        assign(
            [lengths.copy() for lengths in batch],
            dp=dp, cp=cp, budget_tokens=budget_of(cp, 64), cost=COST, equal_micro_batches=equal,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first == second


@settings(max_examples=60)
@given(batch=batches, dp=st.integers(1, 9))
def test_not_worse_than_whole_sequences_in_order(batch, dp):
    """Rank r trains on sequences r, r + dp, ...: what every other trainer does."""
    assignment = assign(batch, dp=dp, cp=1, budget_tokens=600, cost=COST)
    in_order = [sum(COST.work(lengths).sum() for lengths in batch[rank::dp]) for rank in range(dp)]
    # Graham's bound of the greedy rule is 4/3 of the best; in practice it is far better than any order.
    seconds = [sum(plan.share.seconds for plan in plans) for plans in assignment]
    assert max(seconds) <= max(in_order) * 4 / 3
    assert sum(seconds) == pytest.approx(sum(in_order))


def test_balanced_where_arithmetic_allows():
    """Many documents, none dominating: nobody waits more than 5%, whatever the layout."""
    rng = np.random.default_rng(0)
    batch = [np.minimum(rng.lognormal(6, 1, 80).astype(np.int64) + 1, 4096) for _ in range(64)]
    for dp, cp, equal in [(8, 1, False), (8, 8, False), (8, 8, True), (64, 4, True)]:
        assignment = assign(
            batch, dp=dp, cp=cp, budget_tokens=8192 // cp, cost=COST, equal_micro_batches=equal
        )
        balance = outcome_of(assignment, batch, cp, COST).balance
        assert 0.95 < balance <= 1 + 1e-9, (dp, cp, equal, balance)


def test_context_parallelism_only_for_those_that_need_it():
    """Eight documents on eight ranks stay whole; five among short ones are split; a long one must be."""
    cost = CostModel.for_shape(LLAMA3_8B)
    long, short = [65_536], [700] * 90
    eight = best_share(np.array(long * 8), 8, 65_536, cost)
    assert eight.split_threshold_tokens == NEVER and sorted(eight.owners) == [*range(8)]
    five = best_share(np.array(long * 5 + short * 3), 8, 65_536, cost)
    assert 700 < five.split_threshold_tokens <= 65_536
    one = best_share(np.array([524_288]), 8, 65_536, cost)
    assert one.split_threshold_tokens == 524_288 and one.max_tokens == 65_536
    whole = best_share(np.array([40, 100, 60, 50]), 2, 250, CostModel(1.0, quadratic=1.0, exchange=1e6))
    assert whole.owners == (1, 0, 1, 1)  # by work: 100² is most of it


def test_equal_micro_batches_even_when_one_document_is_most_of_the_work():
    batch = [np.array([8192]), np.full(512, 32), np.full(256, 64)]
    assignment = assign(batch, dp=3, cp=1, budget_tokens=8192, cost=COST, equal_micro_batches=True)
    counts = [len(plans) for plans in assignment]
    assert len(set(counts)) == 1 and counts[0] > 1
    assert all(plan.documents for plans in assignment for plan in plans)
    given = [lengths_of(plan, batch).tolist() for plan in assignment[0]]
    assert given == [[8192]] + [[32]] * (counts[0] - 1), "the shortest, as they add to the longest rank"


@pytest.mark.parametrize("equal", [False, True])
def test_no_more_micro_batches_than_are_needed(equal):
    def number(lengths, cp, budget_tokens):
        batch = [np.array(lengths)]
        (plans,) = assign(
            batch, dp=1, cp=cp, budget_tokens=budget_tokens, cost=COST, equal_micro_batches=equal
        )
        return len(plans)

    assert number([60] * 3, 1, 100) == 3  # two have room for as many tokens, but not for these documents
    assert number([3] * 512, 8, 200) == 1  # 192 tokens a rank where all stay whole; split, each has 2


def test_only_documents_that_must_be_split_count_their_exchange():
    cost = CostModel(linear=1.0, quadratic=0.0, exchange=1.0)
    batch = [np.array([100] + [60] * 5)]  # 50 + 50 seconds for the first, 30 for each of the others
    assignment = assign(batch, dp=2, cp=2, budget_tokens=60, cost=cost)
    dealt = [sorted(number for plan in plans for _, number in plan.documents) for plans in assignment]
    assert dealt == [[0, 5], [1, 2, 3, 4]]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=8), st.sampled_from([2, 4, 8]), st.integers(0, 300))
def test_no_other_threshold_is_faster(documents, cp, extra):
    lengths = np.array(documents)
    budget = int(threshold.slice_tokens(lengths, cp).sum()) + extra
    shares = [threshold._share(lengths, tokens, cp, COST) for tokens in (NEVER, *documents)]
    fastest = min(share.seconds for share in shares if share.max_tokens <= budget)
    assert best_share(lengths, cp, budget, COST).seconds <= fastest / (1 - threshold._GOOD_ENOUGH)


def test_a_micro_batch_takes_whatever_still_fits_longest_first():
    tokens = np.array([1, 6, 5, 2, 3])
    assert [chosen.tolist() for chosen in fill_alike(tokens, tokens, 10)] == [[1, 4, 0], [2, 3]]


def test_a_micro_batch_too_full_for_one_document_takes_a_smaller_one():
    first, second = fill_even(np.array([3.0, 9.0, 5.0, 1.0]), np.array([6.0, 5.0, 4.0, 1.0]), 10, 2)
    assert (first.tolist(), second.tolist()) == ([0, 2], [1, 3])


def test_a_document_beyond_the_budget_is_refused_by_name():
    with pytest.raises(UserError, match=r"sequence 1 .*document 2: 5000 tokens are 1250 on each of 4 .*1000"):
        assign([np.array([10]), np.array([1, 2, 5000])], dp=2, cp=4, budget_tokens=1000, cost=COST)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_step_has_its_documents_where_they_were_assigned(pp):
    """No loss shows it when not: ranks only wait, or run out of memory."""
    lengths = [[58, 400, 20, 20], [90, 40, 30, 30, 8, 200, 100], [190, 100, 50, 40, 30, 20, 9, 59], [498]]
    cost = CostModel(linear=1.0, quadratic=0.1, exchange=100.0)  # tokens say little, and splitting is dear
    sequences = [
        PackedSequence(
            np.zeros(498, np.uint32), np.cumsum([0, *own]).astype(np.int64), None, Identity("d", "-", 0)
        )
        for own in lengths
    ]
    numbers_of_micro_batches, group = set(), cast(dist.ProcessGroup, None)  # nothing is communicated
    for dp, cp in np.ndindex(2, 2):
        axes = {"dp": Axis(dp, 2, group), "cp": Axis(cp, 2, group), "pp": Axis(0, pp, group)}
        groups = ParallelGroups(**axes, tp=Axis(0, 1, group), dp_cp=Axis(2 * cp + dp, 4, group))
        assignment = share_out(sequences, groups, 498, cost)  # the last document is padded to 500
        plans = assignment[dp]
        assert all(plan.share.max_tokens <= 250 for plan in plans)
        batches = micro_batches(sequences, assignment, groups, Layout(cp=2, pp=pp), torch.device("cpu"))
        for plan, batch in zip(plans, batches, strict=True):
            context = batch.documents.context.plan
            own = [lengths[index.sample][index.document] for index in plan.documents]
            assert context == ContextPlan.build(
                [0, *np.cumsum(own).tolist()],
                cp_size=2,
                split_threshold_tokens=plan.share.split_threshold_tokens,
                owners=plan.share.owners,
            )
            assert max(context.slice_length(rank) for rank in range(2)) == plan.share.max_tokens
        numbers_of_micro_batches.add(len(plans))
    assert len(numbers_of_micro_batches) == 2 // pp, "pipelines of unequal ones wait for each other"


@pytest.mark.parametrize(
    ("sequence_parallel", "token_multiple", "tokens"),
    [(False, 1, 37), (True, 1, 38), (False, 16, 48), (True, 16, 64)],
)
def test_tokens_are_padded_for_the_ranks_and_the_tiles_that_they_are_cut_into(
    sequence_parallel, token_multiple, tokens
):
    group = cast(dist.ProcessGroup, None)
    alone, of_two = Axis(0, 1, group), Axis(0, 2, group)
    batch = micro_batch(
        collate_pieces([Piece(np.ones(37, np.uint32), None)]),
        groups=ParallelGroups(dp=alone, cp=alone, pp=alone, tp=of_two, dp_cp=alone),
        layout=Layout(tp=2, sequence_parallel=sequence_parallel),
        device=torch.device("cpu"),
        token_multiple=token_multiple,
    )
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (1, tokens)
    assert batch.num_targets == 36 == int((batch.labels == 1).sum())


def test_fit_finds_the_model_that_made_the_measurements():
    rng = np.random.default_rng(1)
    lengths = [np.full(count, n) for n in (64, 512, 4096, 16384) for count in (1, 3, 9)]
    true, fixed = CostModel(linear=2e-6, quadratic=5e-10), 3e-4
    noise = 1 + 0.02 * rng.standard_normal(len(lengths))
    seconds = [fixed + true.work(n).sum() for n in lengths] * noise
    found, found_fixed = fit(lengths, seconds)
    # 2% noise on 12 measurements of 3 unknowns
    assert found.linear == pytest.approx(true.linear, rel=0.1)
    assert found.quadratic == pytest.approx(true.quadratic, rel=0.1)
    assert found_fixed == pytest.approx(fixed, rel=0.1)


def test_fit_leaves_out_what_noise_makes_negative():
    lengths = [np.array([n]) for n in (100, 200, 400, 800)]
    found, fixed = fit(lengths, [n.sum() * 1e-6 - 1e-6 for n in lengths])  # a fixed cost below zero
    assert fixed == 0 and found.linear == pytest.approx(1e-6, rel=0.02)


def test_cost_of_llama_3_8b_on_an_h100():
    """Against arithmetic by hand: 16.1 GFLOP per token forward, 0.524 MFLOP per token and token of length."""
    cost = CostModel.for_shape(LLAMA3_8B)
    assert cost.linear == pytest.approx(4 * 2 * 7.504e9 / 692e12, rel=0.01)  # 7.5B weights do matrix products
    assert cost.quadratic == pytest.approx(2 * 32 * 4096 * (2 / 539e12 + 2.5 / 516e12), rel=1e-6)
    assert cost.exchange == pytest.approx(32 * 4096 * 3 / 360e9, rel=1e-6)
    assert cost.exchange_time(100, 1) == 0  # a rank has its own part
    assert cost.exchange_time(100, 4) == pytest.approx(75 * cost.exchange)
