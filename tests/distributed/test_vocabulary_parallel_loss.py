"""Chunked cross entropy with the vocabulary spread over ranks, against PyTorch's dense one.

Tolerance 1e-5 in fp32: the same sums in another order.
"""

from __future__ import annotations

import pytest
import torch
from rank_pool import group_of

from megatron_prolong.model.cross_entropy import VocabularyShard, cross_entropy_sum, token_losses


def example(num_tokens: int, real_vocab: int, padded_vocab: int):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = 2 * torch.randn(num_tokens, 12, generator=generator)
    weight = torch.randn(padded_vocab, 12, generator=generator)
    weight[real_vocab:] += 50.0  # padding that would ruin the softmax if it counted
    labels = torch.randint(real_vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.3] = -100
    labels[8:16] = -100
    return hidden, weight, labels


def on_rank(rank: int, tp: int, num_tokens: int, real_vocab: int, padded_vocab: int):
    """Loss of each token and their sum, this rank's part of hidden's gradient, the gradient of its rows; numpy."""
    group = group_of(tuple(range(tp)))
    if rank >= tp:
        return None
    hidden, weight, labels = example(num_tokens, real_vocab, padded_vocab)
    rows = padded_vocab // tp
    mine = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    shard = VocabularyShard(rank * rows, real_vocab, group)
    total = cross_entropy_sum(hidden, mine, labels, shard, 8)
    grads = torch.autograd.grad(0.7 * total, (hidden, mine))
    return [x.detach().numpy() for x in (token_losses(hidden, mine, labels, shard, 8), total, *grads)]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("real_vocab", "padded_vocab"),
    [(32, 32), (27, 32), (9, 32)],
    ids=["full", "padded", "ranks of padding only"],
)
def test_equals_dense(four_ranks, tp, real_vocab, padded_vocab):
    num_tokens = 37
    results = [r for r in four_ranks.run(on_rank, tp, num_tokens, real_vocab, padded_vocab) if r is not None]
    losses, totals, dhidden, dweight = (
        [torch.from_numpy(x) for x in parts] for parts in zip(*results, strict=True)
    )
    hidden, weight, labels = example(num_tokens, real_vocab, padded_vocab)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:real_vocab].T, labels, reduction="none")
    expected_dhidden, expected_dweight = torch.autograd.grad(0.7 * expected.sum(), (hidden, weight))
    assert len(losses) == tp
    for of_rank, total in zip(losses, totals, strict=True):
        torch.testing.assert_close(of_rank, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, expected.detach().sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(dhidden), expected_dhidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(dweight), expected_dweight, rtol=1e-5, atol=1e-5)
    if real_vocab > padded_vocab // tp:
        assert (dhidden[0] - expected_dhidden).abs().max() > 1e-2, "one rank's part must not be the whole"
