"""Context-parallel attention against plain causal attention of each document, on real gloo ranks.

Tolerance in fp32: 1e-5 absolute and relative for values of order one; the two sides differ in the order of
sums only. bf16 is compared with fp32 arithmetic on the same inputs within 0.03: roundings of values up to
four at 2**-8, of every rank's part and of their sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import group_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_prolong.model.context_parallel import ContextParallel, context_attention
from megatron_prolong.model.context_plan import ContextPlan
from tests.model.dense import gather

EXCHANGES = ["all_gather", "p2p", "a2a", "a2a+p2p"]


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    cp: int
    exchange: str
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    threshold: int = 0
    multiple: int = 1
    inner_size: int = 2  # of a2a+p2p
    dtype: torch.dtype = torch.float32
    seed: int = 0
    moved: int | None = None  # a document whose inputs are moved

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @property
    def plan(self) -> ContextPlan:
        return ContextPlan.build(
            self.cu_seqlens, cp_size=self.cp, multiple=self.multiple, split_threshold_tokens=self.threshold
        )

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output, over the packed sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        tensors = [torch.randn(self.cu_seqlens[-1], n, self.head_dim, generator=generator) for n in heads]
        if self.moved is not None:
            start, stop = self.cu_seqlens[self.moved : self.moved + 2]
            for tensor in tensors:
                tensor[start:stop] += 3.0
        return [tensor.to(self.dtype) for tensor in tensors]


def on_rank(rank: int, case: Case):
    """This rank's slices of output and gradients (fp32 numpy), or None where the case has fewer ranks."""
    group = group_of(tuple(range(case.cp)))
    subgroups: tuple = ()
    if case.exchange == "a2a+p2p":
        size = min(case.inner_size, case.cp)
        rows = [tuple(range(start, start + size)) for start in range(0, case.cp, size)]
        columns = list(zip(*rows, strict=True))
        groups = {members: group_of(members) for members in (*rows, *columns)}
        subgroups = tuple(groups[m] for kind in (rows, columns) for m in kind if rank in m)
    if rank >= case.cp:
        return None
    q, k, v, dout = (case.plan.take(x, rank, 0.0) for x in case.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    context = ContextParallel(case.plan, rank, group, case.exchange, subgroups)
    out = torch.cat(context_attention(q, k, v, context))
    assert out.dtype == q.dtype and out.shape == q.shape
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return [x.detach().float().numpy() for x in (out, *grads)]


def distributed(pool, case: Case) -> list[torch.Tensor]:
    """Output and gradients gathered into the packed sequence; everything must be finite, padding included."""
    slices = [result for result in pool.run(on_rank, case) if result is not None]
    assert len(slices) == case.cp
    tensors = [[torch.from_numpy(x) for x in parts] for parts in zip(*slices, strict=True)]
    assert all(torch.isfinite(x).all() for parts in tensors for x in parts)
    return [gather(case.plan, parts) for parts in tensors]


def plain(case: Case) -> list[torch.Tensor]:
    """Each document alone, in fp32, with PyTorch's unfused attention."""
    q, k, v, dout = (x.float() for x in case.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    outs = []
    for start, stop in pairwise(case.cu_seqlens):
        heads = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        heads[1:] = [x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=0) for x in heads[1:]]
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        outs.append(out.transpose(0, 1))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def assert_same(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=message)


document_lengths = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=10),
    st.integers(1, 150).map(lambda length: [length]),
    st.tuples(st.integers(60, 150), st.lists(st.integers(1, 5), max_size=8)).map(lambda x: [x[0], *x[1]]),
).map(tuple)


@pytest.mark.parametrize(
    ("cp", "exchange"), [(1, "p2p"), *((cp, exchange) for cp in (2, 4) for exchange in EXCHANGES)]
)
@settings(max_examples=30)
@given(
    lengths=document_lengths,
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2), (12, 3), (8, 8), (16, 4)]),
    head_dim=st.sampled_from([4, 16]),
    threshold=st.sampled_from([0, 10, 50, 1000]),
    multiple=st.sampled_from([1, 2, 4]),
    inner_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_equals_each_document_alone(
    four_ranks, cp, exchange, lengths, heads, head_dim, threshold, multiple, inner_size, seed
):
    case = Case(
        lengths, cp, exchange, heads[0], heads[1], head_dim, threshold, multiple, inner_size, seed=seed
    )
    assert_same(distributed(four_ranks, case), plain(case), 1e-5)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cp", [2, 4])
def test_split_and_local_documents_together(four_ranks, exchange, cp):
    """The case every layout meets, spelled out: nothing here depends on what the property test draws."""
    case = Case((3, 97, 1, 64, 12, 200, 5, 5, 9), cp, exchange, 8, 2, 16, threshold=60, multiple=2)
    assert [span.stop - span.start for span in case.plan.split] == [97, 64, 200]
    assert sum(len(documents) for documents in case.plan.local) == 6
    ours = distributed(four_ranks, case)
    assert_same(ours, plain(case), 1e-5)
    assert all(x.flatten(1).norm(dim=1).min() > 1e-3 for x in (ours[0], ours[3])), "a row is empty"


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16_stays_within_its_rounding(four_ranks, exchange):
    case = Case((150, 3, 70), 4, exchange, 8, 2, 16, threshold=60, dtype=torch.bfloat16)
    assert_same(distributed(four_ranks, case), plain(case), 0.03)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_document_is_blind_to_the_others(four_ranks, exchange, moved):
    lengths = (70, 4, 33, 60)  # split, local, local, split
    before = Case(lengths, 4, exchange, 8, 4, threshold=50)
    after = Case(lengths, 4, exchange, 8, 4, threshold=50, moved=moved)
    start, stop = before.cu_seqlens[moved : moved + 2]
    for old, new in zip(distributed(four_ranks, before), distributed(four_ranks, after), strict=True):
        is_changed = (old != new).flatten(1).any(dim=1)
        assert is_changed[start:stop].any()
        is_changed[start:stop] = False
        assert not is_changed.any(), "another document moved"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("lengths", "threshold"),
    [((1,), 0), ((1,), 1000), ((2, 9), 1000), ((3, 1), 0), ((0, 2, 0), 0)],
    ids=["one token split", "one token local", "two ranks empty", "more chunks than tokens", "no length"],
)
def test_ranks_with_nothing_but_padding(four_ranks, exchange, lengths, threshold):
    case = Case(lengths, 4, exchange, threshold=threshold, multiple=2)
    assert any(not (case.plan.take(torch.ones(sum(lengths)), rank, 0) > 0).any() for rank in range(4))
    assert_same(distributed(four_ranks, case), plain(case), 1e-5)
