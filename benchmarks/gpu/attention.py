"""Attention kernels on one GPU, forward and backward, with an 8B model's heads in bf16: ours beside PyTorch's own.

    python benchmarks/gpu/attention.py  # writes benchmarks/gpu/attention.json row by row

- native: `packed_attention`, what our layers call without Transformer Engine (FlashAttention-2, variable lengths)
- flash3: the same with FlashAttention-3 under it, where flash-attn-3 is installed
- te: Transformer Engine's DotProductAttention on packed documents, what they call with it
- sdpa: PyTorch's `scaled_dot_product_attention(is_causal=True)`, one document after another
- flex: PyTorch's `flex_attention`, compiled, under a block mask of the documents

TFLOP/s count the causal half inside documents; the backward counts 2.5 times the forward.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure
from shapes import LLAMA3_8B as SHAPE
from throughput import LOADS, documents

WAYS = ("native", "flash3", "te", "sdpa", "flex")
CASES = {
    "one document, 8K": [8192],
    "one document, 64K": [65_536],
    "ProLong 64K": [len(document) for document in documents(LOADS["ProLong 64K"], SHAPE)],
    "one document, 256K": [262_144],
    "1,536 documents, 255K": [170] * 1536,  # how empty tiles weigh
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""out [T, N, D] of queries [T, N, D], keys and values [T, G, D]."""


def native(lengths: list[int]) -> Attend:
    from megatron_prolong.model.attention import packed_attention

    cu_seqlens = [0, *accumulate(lengths)]
    return lambda q, k, v: packed_attention(q, k, v, cu_seqlens)


def flash3(lengths: list[int]) -> Attend:
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl("FA3")
    return native(lengths)


def te(lengths: list[int]) -> Attend:
    from transformer_engine.pytorch import DotProductAttention

    attend = DotProductAttention(
        SHAPE.num_heads, SHAPE.head_dim, num_gqa_groups=SHAPE.num_kv_heads, qkv_format="thd",
        attn_mask_type="padding_causal",
    )  # fmt: skip
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    given = {f"cu_seqlens_{which}": cu_seqlens for which in ("q", "kv")}
    given |= {f"max_seqlen_{which}": max(lengths) for which in ("q", "kv")}
    return lambda q, k, v: attend(q, k, v, **given).view_as(q)


def sdpa(lengths: list[int]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for document in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            heads = (x.transpose(0, 1).unsqueeze(0) for x in document)
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)

    return attend


def flex(lengths: list[int]) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens, counts = sum(lengths), torch.tensor(lengths, device="cuda")
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), counts)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_T[query] == document_T[key])

    mask = torch.compile(create_block_mask)(visible, None, None, num_tokens, num_tokens, device="cuda")
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled(*heads, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)

    return attend


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    lengths = case["lengths"]
    torch.manual_seed(0)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    q, k, v = (
        torch.randn(sum(lengths), n, SHAPE.head_dim, dtype=torch.bfloat16, device="cuda").requires_grad_()
        for n in heads
    )
    dout, attend = torch.randn_like(q), globals()[case["way"]](lengths)

    def step() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
        torch.cuda.synchronize()

    return {"seconds": measure.seconds(step, repeats=5)}


def main() -> None:
    for name, lengths in CASES.items():
        flops = 3.5 * 2 * SHAPE.num_heads * SHAPE.head_dim * sum(length**2 for length in lengths)
        for way in WAYS:
            row: dict[str, Any] = {"documents": name, "way": way}
            found = measure.in_fresh_process(__file__, {"way": way, "lengths": lengths})
            if "failed" in found:
                row |= found
            else:
                row |= {
                    "milliseconds": round(found["seconds"] * 1e3, 2),
                    "tflops": round(flops / found["seconds"] / 1e12, 1),
                }
            print(json.dumps(row), flush=True)
            what = "forward and backward of causal attention inside documents, bf16, 32 heads on 8, 128 wide"
            measure.write_row(Path(__file__).with_suffix(".json"), what, row, ("documents", "way"))


if __name__ == "__main__":
    measure.run(__doc__, measure_case, main)
