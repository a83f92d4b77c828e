"""Packed attention against each document alone, values and gradients.

Tolerance 1e-5 (absolute and relative) in fp32: inputs are standard normal, outputs of order one, and the two
sides differ only in the order of fp32 sums. bf16 is compared with the fp32 result of the same bf16 inputs;
0.02 is two to three roundings of values up to four (2**-8 each).
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from dense import document_attention, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prolong.model.attention import BlockAttention, cached_attention, packed_attention
from megatron_prolong.model.flash import (
    BATCHED_BELOW_TOKENS,
    Block,
    attend,
    attend_backward,
    block_forward,
    merge,
)

# Many documents of like length (run together, padded), single tokens, empty ones, and long ones (run alone).
document_lengths = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.lists(st.integers(28, 32), min_size=2, max_size=12),
    st.lists(st.just(1), min_size=1, max_size=9),
    st.lists(
        st.sampled_from([1, 7, BATCHED_BELOW_TOKENS, BATCHED_BELOW_TOKENS + 33]), min_size=1, max_size=3
    ),
)


def gradients(attention, q, k, v, dout):
    out = attention(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@settings(max_examples=60)
@given(
    lengths=document_lengths,
    kv_heads=st.sampled_from([1, 2, 3]),
    group_size=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([4, 16, 24]),
    padding=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
def test_packed_equals_each_document_alone(lengths, kv_heads, group_size, head_dim, padding, seed):
    cu_seqlens = [0, *accumulate(lengths)]
    q, k, v, dout = random_qkv(cu_seqlens[-1] + padding, kv_heads * group_size, kv_heads, head_dim, seed=seed)
    packed = gradients(lambda q, k, v: packed_attention(q, k, v, cu_seqlens), q, k, v, dout)
    dense = gradients(lambda q, k, v: document_attention(q, k, v, cu_seqlens), q, k, v, dout)
    for ours, plain in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_newest_queries_against_earlier_keys():
    """Causal blocks with more keys than queries: two of a shape (5 of 20, run together), and two that are alone,
    of other queries (25 of 60) or only of other keys (5 of 30)."""
    q, k, v, dout = random_qkv(130, 4, 2, 8)
    blocks = (Block(0, 25, 0, 60), Block(25, 30, 60, 80), Block(30, 35, 80, 100), Block(35, 40, 100, 130))
    newest = torch.cat([torch.arange(*rows) for rows in ((35, 60), (75, 80), (95, 100), (125, 130))])

    def rectangular(q, k, v):
        return BlockAttention.apply(q[newest], k, v, blocks, True)

    def dense(q, k, v):
        return document_attention(q, k, v, [0, 60, 80, 100, 130])[newest]

    for ours, plain in zip(
        gradients(rectangular, q, k, v, dout[newest]), gradients(dense, q, k, v, dout[newest]), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_its_rounding():
    cu_seqlens = [0, *accumulate([40, 1, 700, 33, 36, 38])]
    q, k, v, dout = random_qkv(cu_seqlens[-1], 6, 2, 16, dtype=torch.bfloat16)
    ours = gradients(lambda q, k, v: packed_attention(q, k, v, cu_seqlens), q, k, v, dout)
    exact = gradients(
        lambda q, k, v: document_attention(q.float(), k.float(), v.float(), cu_seqlens), q, k, v, dout.float()
    )
    for low, high in zip(ours, exact, strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), high.float(), rtol=0.02, atol=0.02)


def test_gradients_equal_finite_differences():
    cu_seqlens = [0, 4, 5, 8, 11]  # a batch of unequal documents, one single token
    q, k, v, _ = random_qkv(12, 4, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, cu_seqlens), (q, k, v))


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_a_document_is_blind_to_the_others(changed):
    lengths = [30, 33, 600, 32]  # 30, 33 and 32 share a kernel call
    starts = [0, *accumulate(lengths)]
    q, k, v, dout = random_qkv(starts[-1], 4, 2, 16)
    before = gradients(lambda q, k, v: packed_attention(q, k, v, starts), q, k, v, dout)
    span = slice(starts[changed], starts[changed + 1])
    with torch.no_grad():
        for tensor in (q, k, v, dout):
            tensor[span] += 3.0
    after = gradients(lambda q, k, v: packed_attention(q, k, v, starts), q, k, v, dout)
    for old, new in zip(before, after, strict=True):
        is_changed = (old != new).flatten(1).any(dim=1)
        assert is_changed[span].any()
        is_changed[span] = False
        assert not is_changed.any(), "another document moved"


@settings(max_examples=25)
@given(num_cached=st.integers(1, 70), num_new=st.integers(1, 70))
def test_cache_equals_the_whole_document(num_cached, num_new):
    num_new = min(num_new, num_cached)
    q, k, v, _ = random_qkv(num_cached, 6, 2, 8)
    whole = document_attention(q, k, v, [0, num_cached])
    newest = cached_attention(q[-num_new:], k, v)
    torch.testing.assert_close(newest, whole[-num_new:].detach(), rtol=1e-5, atol=1e-5)


def test_blocks_over_different_keys_merge_to_the_whole():
    """The algebra of ring attention: final output and log-sum-exp give each block its exact gradient."""
    q, k, v, dout = random_qkv(60, 6, 3, 8)
    dense = gradients(lambda q, k, v: document_attention(q, k, v, [0, 60]), q, k, v, dout)
    q, k, v = q.detach()[40:], k.detach(), v.detach()
    out, lse = block_forward(q, k[40:], v[40:], causal=True)
    for keys in (slice(0, 15), slice(15, 40)):
        out, lse = merge(out, lse, *block_forward(q, k[keys], v[keys], causal=False))
    torch.testing.assert_close(out, dense[0][40:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        lse, torch.logsumexp(_causal_scores(q, k), dim=-1).transpose(0, 1), rtol=1e-5, atol=1e-5
    )
    only_these_queries = torch.cat([torch.zeros(40, 6, 8), dout[40:]])
    q_whole, k_whole, v_whole, _ = random_qkv(60, 6, 3, 8)
    expected = gradients(
        lambda q, k, v: document_attention(q, k, v, [0, 60]), q_whole, k_whole, v_whole, only_these_queries
    )
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for keys, causal in ((slice(0, 15), False), (slice(15, 40), False), (slice(40, 60), True)):
        blocks = (Block(0, 20, 0, keys.stop - keys.start),)
        part = attend_backward(dout[40:], q, k[keys], v[keys], out, lse, blocks, causal)
        dq += part[0]
        dk[keys], dv[keys] = part[1], part[2]
    torch.testing.assert_close(dq, expected[1][40:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dk, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dv, expected[3], rtol=1e-5, atol=1e-5)


def _causal_scores(q, k):
    k = k.repeat_interleave(2, dim=1)
    scores = torch.einsum("tnd,snd->nts", q, k) * 8**-0.5
    visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(~visible, -torch.inf)


def test_rows_of_no_block_are_empty_and_harmless():
    q, k, v, dout = random_qkv(6, 2, 1, 4)
    blocks = (Block(0, 2, 0, 2), Block(3, 3, 3, 3))
    out, lse = attend(q, k, v, blocks, True)
    assert torch.equal(out[2:], torch.zeros(4, 2, 4)) and torch.isneginf(lse[2:]).all()
    assert torch.isfinite(lse[:2]).all()
    grads = attend_backward(dout, q, k, v, out, lse, blocks, True)
    assert all(torch.isfinite(grad).all() and not grad[2:].any() and grad[:2].any() for grad in grads)
    merged, merged_lse = merge(out, lse, out, lse)
    torch.testing.assert_close(merged, out)
    assert torch.isneginf(merged_lse[2:]).all()
