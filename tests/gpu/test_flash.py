"""Attention over blocks on a GPU in bf16 against the CPU's in fp32.

Bounds: bf16 keeps 8 bits, so outputs of values around 1 are within 2e-2; gradients sum some of them: 4e-2.
"""

from __future__ import annotations

import pytest
import torch

from megatron_prolong.model.flash import Block, attend, attend_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

BLOCKS = {
    "one token over a cache": (Block(0, 1, 0, 40),),
    "a chunk over a cache": (Block(0, 7, 0, 40),),
    "rows of a document": (Block(3, 9, 2, 20),),
    "a document": (Block(0, 40, 0, 40),),
    "documents": (Block(0, 5, 0, 5), Block(5, 6, 5, 6), Block(6, 40, 6, 40)),
    "apart": (Block(2, 5, 1, 9), Block(20, 30, 12, 40)),
    "no queries": (Block(4, 4, 0, 8),),
    "no keys": (Block(0, 4, 8, 8),),
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Those that a training has."""
    from megatron_prolong.runtime.flash_attention_3 import use_flash_attention_3

    use_flash_attention_3()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_attend_as_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    blocks = BLOCKS[name]
    q, k, v, dout = (
        torch.randn(40, 4, 16),
        torch.randn(40, 2, 16),
        torch.randn(40, 2, 16),
        torch.randn(40, 4, 16),
    )
    causal = name != "no keys"
    out, lse = attend(q, k, v, blocks, causal)
    on_gpu = [x.to("cuda", torch.bfloat16) for x in (q, k, v, dout)]
    gpu_out, gpu_lse = attend(*on_gpu[:3], blocks, causal)
    torch.testing.assert_close(gpu_out.float().cpu(), out, atol=2e-2, rtol=0)
    torch.testing.assert_close(gpu_lse.cpu(), lse, atol=2e-2, rtol=0)
    gradients = attend_backward(dout, q, k, v, out, lse, blocks, causal)
    on_gpu = attend_backward(on_gpu[3], *on_gpu[:3], gpu_out, gpu_lse, blocks, causal)
    for mine, theirs in zip(on_gpu, gradients, strict=True):
        torch.testing.assert_close(mine.float().cpu(), theirs, atol=4e-2, rtol=0)
