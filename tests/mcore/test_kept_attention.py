"""Attention between the two passes through a recomputed layer: computed once, held without its inputs."""

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_prolong.mcore.kept_attention import KeptAttention
from megatron_prolong.model.attention import packed_attention


def attend(q, k, v):
    """In two parts, as where some documents are split over ranks."""
    first = packed_attention(q[:17], k[:17], v[:17], [0, 5, 17])
    return first, packed_attention(q[17:], k[17:], v[17:], [0, 7])


def qkv(requires_grad=True):
    """Queries of 4 heads and keys of 2, as views of one projection as Megatron splits it, and contiguous values."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(24, 8, 8, generator=generator).requires_grad_(requires_grad)
    return packed, (packed[:, :4], packed[:, 4:6], packed[:, 6:].contiguous())


def test_output_and_gradients_are_those_of_plain_attention_to_the_last_bit():
    plain, inputs = qkv()
    expected = torch.cat(attend(*inputs))
    expected.square().sum().backward()
    kept = KeptAttention(attend, *qkv(requires_grad=False)[1])
    packed, inputs = qkv()
    out = torch.cat(kept.again(*inputs))
    assert torch.equal(torch.cat(kept.outs), expected) and torch.equal(out, expected)
    out.square().sum().backward()
    assert torch.equal(packed.grad, plain.grad)


def test_attention_runs_once_and_its_inputs_are_not_held():
    calls = []
    packed, inputs = qkv(requires_grad=False)
    memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in (packed, inputs[2])]

    def watched(*tensors):
        calls.append(tensors[0].requires_grad)
        outs = attend(*tensors)
        memory.extend(StorageWeakRef(out.untyped_storage()) for out in outs)
        return outs

    gc.disable()  # a cycle would hold an output until Python's collector looks: at the length meant, 0.5 GB
    try:
        with torch.no_grad():  # as Megatron's checkpoint runs a layer's first pass
            kept = KeptAttention(watched, *inputs)
        del packed, inputs
        assert all(storage.expired() for storage in memory[:2])
        again, inputs = qkv()
        torch.cat(kept.again(*inputs)).sum().backward()
        assert calls == [True] and again.grad is not None
        del kept
        assert len(memory) == 4 and all(storage.expired() for storage in memory)
    finally:
        gc.enable()
