"""Packed attention against the two usual ways, forward and backward, on packs of short documents.

- packed: `packed_attention`, one call for the pack
- per document: `scaled_dot_product_attention(is_causal=True)` for one document after another
- masked: one `scaled_dot_product_attention` under a block-diagonal causal mask, as packing is done with
  transformers when no variable-length kernel is there

    python benchmarks/attention.py          # writes benchmarks/attention.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import measure
import torch

from megatron_prolong.model.attention import packed_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
WAYS = ("packed", "per document", "masked")


def document_lengths(num_tokens: int, shape: str) -> list[int]:
    """Lengths that fill `num_tokens`, the last one cut. "short": log-normal, median 100, clipped at 8 and 1024."""
    if shape == "one":
        return [num_tokens]
    generator = torch.Generator().manual_seed(0)
    draws = (4.6 + torch.randn(num_tokens, generator=generator)).exp().clamp(8, 1024).int().tolist()
    ends = [end for end in accumulate(draws) if end < num_tokens] + [num_tokens]
    return [stop - start for start, stop in pairwise([0, *ends])]


def attention(way: str, q, k, v, cu_seqlens: list[int], mask) -> torch.Tensor:
    if way == "packed":
        return packed_attention(q, k, v, cu_seqlens)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)] if way == "per document" else [len(q)]
    outs = []
    # split, not slices: the gradient of each slice would be a zero tensor as long as the pack
    for document in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1).unsqueeze(0) for x in document)
        out = sdpa(*heads, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def steps(case: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Forward and backward by each way of the case, all on the same tensors."""
    torch.manual_seed(0)
    num_tokens, dtype = case["tokens"], getattr(torch, case["dtype"])
    cu_seqlens = [0, *accumulate(document_lengths(num_tokens, case["documents"]))]
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (torch.randn(num_tokens, n, HEAD_DIM, dtype=dtype).requires_grad_() for n in heads)
    dout = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)

    def step(way: str) -> object:
        mask = block_diagonal(cu_seqlens) if way == "masked" else None
        return torch.autograd.grad(attention(way, q, k, v, cu_seqlens, mask), (q, k, v), dout)

    return {way: partial(step, way) for way in case["ways"]}


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    """Of one way its memory; of several the time of each, in turns, so that other work falls on all of them."""
    runs = steps(case)
    if len(runs) == 1:
        with measure.PeakMemory() as memory:
            next(iter(runs.values()))()
        return {"peak_mib": round(memory.added_bytes / measure.MIB, 1)}
    milliseconds = {way: float("inf") for way in runs}
    for _ in range(case["repeats"]):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            milliseconds[way] = min(milliseconds[way], (time.perf_counter() - start) * 1e3)
    return milliseconds


def block_diagonal(cu_seqlens: list[int]) -> torch.Tensor:
    lengths = torch.tensor(cu_seqlens).diff()
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return (document_T[:, None] == document_T).tril()


def cases() -> Iterator[dict[str, Any]]:
    for documents, dtype in product(("short", "one"), ("float32", "bfloat16")):
        # one document in bf16 takes minutes per step without bf16 instructions
        for tokens in (2048,) if (documents, dtype) == ("one", "bfloat16") else (2048, 8192, 16384):
            # nothing to mask in one document; in bf16 the mask takes minutes too
            has_mask = documents == "short" and (dtype == "float32" or tokens == 2048)
            yield {
                "documents": documents,
                "dtype": dtype,
                "tokens": tokens,
                "ways": WAYS if has_mask else WAYS[:2],
                "repeats": 3 if tokens == 16384 or documents == "one" else 9,
            }


def measure_row(case: dict[str, Any]) -> dict[str, Any]:
    row = {name: case[name] for name in ("documents", "dtype", "tokens")}
    row["num_documents"] = len(document_lengths(case["tokens"], case["documents"]))
    milliseconds = measure.in_fresh_process(__file__, case)
    for way in case["ways"]:
        memory = measure.in_fresh_process(__file__, {**case, "ways": [way]})
        row[way] = {"ms": round(milliseconds[way], 1), **memory}
    for way in case["ways"][1:]:
        row[f"speedup over {way}"] = round(milliseconds[way] / milliseconds["packed"], 2)
    return row


def main() -> None:
    rows = []
    for case in cases():
        rows.append(measure_row(case))
        print(json.dumps(rows[-1]), flush=True)
        write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    measure.write_result(
        Path(__file__).with_suffix(".json"),
        {
            "what": "forward and backward of causal attention of a pack, fastest step, peak of added memory",
            "heads": NUM_HEADS,
            "kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    measure.run(__doc__, measure_case, main)
