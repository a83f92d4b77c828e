"""Chunked loss against PyTorch's dense cross entropy, values and gradients; tensor parallelism is in
tests/distributed/test_vocabulary_parallel_loss.py.

Tolerance 1e-5 in fp32: the same sums in another order. bf16: both sides are compared with fp32 arithmetic on
the same bf16 numbers; logits of size 3 round at 2**-8 * 3 = 0.012, and losses and gradients move by as much.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prolong.model import cross_entropy
from megatron_prolong.model.cross_entropy import VocabularyShard, cross_entropy_sum, token_losses


def example(num_tokens, real_vocab, padded_vocab, dtype=torch.float32, seed=0, masked=0.3):
    """hidden, weight (its padding rows far from zero: they must not count), labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(padded_vocab, 12, generator=generator)
    weight[real_vocab:] += 50.0
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(real_vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < masked] = -100
    return hidden, weight, labels


def dense(hidden, weight, labels, real_vocab):
    logits = (hidden @ weight[:real_vocab].T).float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def with_gradients(losses, hidden, weight):
    """The sum, and the gradients of 0.7 times it: the factor must reach them."""
    total = losses.sum()
    return total.detach(), *torch.autograd.grad(0.7 * total, (hidden, weight))


def chunked(hidden, weight, labels, real_vocab, chunk_tokens):
    return cross_entropy_sum(hidden, weight, labels, VocabularyShard(0, real_vocab), chunk_tokens)


@settings(max_examples=60)
@given(
    num_tokens=st.integers(0, 40),
    chunk_tokens=st.integers(1, 50),
    real_vocab=st.integers(1, 30),
    padding=st.integers(0, 5),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_dense(num_tokens, chunk_tokens, real_vocab, padding, masked, seed):
    hidden, weight, labels = example(num_tokens, real_vocab, real_vocab + padding, seed=seed, masked=masked)
    losses = dense(hidden, weight, labels, real_vocab)
    each = token_losses(hidden, weight, labels, VocabularyShard(0, real_vocab), chunk_tokens)
    torch.testing.assert_close(each, losses.detach(), rtol=1e-5, atol=1e-5)
    ours = with_gradients(chunked(hidden, weight, labels, real_vocab, chunk_tokens), hidden, weight)
    plain = with_gradients(losses, hidden, weight)
    for in_chunks, whole in zip(ours, plain, strict=True):
        torch.testing.assert_close(in_chunks, whole, rtol=1e-5, atol=1e-5)
    assert not ours[2][real_vocab:].any(), "padding rows got a gradient"


def test_a_chunk_without_labels_is_zero_not_nan():
    hidden, weight, labels = example(24, 17, 20)
    labels[8:16] = -100  # the whole second chunk
    with torch.no_grad():
        hidden[8:16] *= 1e6
    losses = token_losses(hidden, weight, labels, VocabularyShard(0, 17), 8)
    _, *grads = with_gradients(chunked(hidden, weight, labels, 17, 8), hidden, weight)
    assert torch.equal(losses[8:16], torch.zeros(8))
    assert losses[16:].any() and torch.isfinite(losses).all()
    assert not grads[0][8:16].any() and all(torch.isfinite(grad).all() for grad in grads)


def test_chunk_size_changes_nothing_and_large_logits_do_not_overflow():
    hidden, weight, labels = example(30, 19, 19)
    with torch.no_grad():
        hidden *= 300
    results = [
        with_gradients(chunked(hidden, weight, labels, 19, chunk), hidden, weight) for chunk in (1, 7, 30, 64)
    ]
    plain = with_gradients(dense(hidden, weight, labels, 19), hidden, weight)
    for result in results:
        for in_chunks, whole in zip(result, plain, strict=True):
            torch.testing.assert_close(in_chunks, whole, rtol=1e-5, atol=1e-3)  # sums of terms of size 300


def test_bfloat16_weight_gradient_is_summed_in_fp32():
    """512 chunks of one token: in bf16 a total of equal parts stops growing at 256 of them."""
    hidden = torch.ones(512, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    total = chunked(hidden, weight, torch.zeros(512, dtype=torch.int64), 2, 1)
    (dweight,) = torch.autograd.grad(total, weight)
    assert dweight.dtype == torch.bfloat16
    assert torch.equal(dweight, torch.tensor([[-256.0] * 4, [256.0] * 4], dtype=torch.bfloat16))


def test_bfloat16_stays_within_its_rounding():
    hidden, weight, labels = example(64, 50, 56, dtype=torch.bfloat16)
    ours = with_gradients(chunked(hidden, weight, labels, 50, 16), hidden, weight)
    exact = with_gradients(dense(hidden.float(), weight.float(), labels, 50), hidden, weight)
    for low, high in zip(ours, exact, strict=True):
        torch.testing.assert_close(low.float(), high.float(), rtol=0.02, atol=0.05)


def test_never_holds_more_than_one_chunk_of_logits():
    """Of all tensors made, forward or backward, at most one as large as a chunk of logits lives at a time."""
    num_tokens, vocab, chunk = 2048, 4096, 64
    hidden, weight, labels = example(num_tokens, vocab, vocab, masked=0.0)
    large: list[StorageWeakRef] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > chunk * vocab * 2:
                    large.append(StorageWeakRef(tensor.untyped_storage()))
            most = max(most, len({storage.cdata for storage in large if not storage.expired()}))
            return result

    with Watch():
        chunked(hidden, weight, labels, vocab, chunk).backward()
        token_losses(hidden, weight, labels, VocabularyShard(0, vocab), chunk)
    assert hidden.grad is not None and most == 1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_kernels_of_a_gpu_do_the_same(monkeypatch, dtype, compiled):
    """Here as they are, and compiled for the CPU; in bf16 the gradient is rounded once, as without them."""
    inputs = example(30, 19, 23, dtype=dtype)
    eager = with_gradients(chunked(*inputs, 19, 8), *inputs[:2])
    monkeypatch.setattr(cross_entropy, "_Softmax", cross_entropy._FusedSoftmax)
    if not compiled:
        monkeypatch.setattr(cross_entropy, "_compiled", lambda function: function)
    fused = with_gradients(chunked(*inputs, 19, 8), *inputs[:2])
    for one, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype is torch.float32 else 0.01, atol=1e-3)
