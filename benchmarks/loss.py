"""Output layer and loss beside PyTorch's own, forward and backward; Llama 3's vocabulary. Takes a GPU if it can.

- ours: `cross_entropy_sum`, in chunks
- PyTorch: `torch.nn.functional.linear_cross_entropy` (2.13 and later), in chunks of as many tokens
- whole: all logits, then `cross_entropy` in fp32

    python benchmarks/loss.py               # writes benchmarks/loss.json, or loss_gpu.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor
from torch.nn import functional

from megatron_prolong.model.cross_entropy import VocabularyShard, cross_entropy_sum

VOCABULARY = 128_256
HIDDEN, TOKENS, CHUNK_TOKENS = (4096, 16_384, 2048) if torch.cuda.is_available() else (512, 2048, 512)
DTYPES = ("bfloat16",) if torch.cuda.is_available() else ("float32", "bfloat16")
REPEATS = 3


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(hidden, weight, labels, VocabularyShard(0, VOCABULARY), CHUNK_TOKENS)


def pytorch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS, chunking_method=None)
    return functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "PyTorch": pytorch,
    "whole": whole,
}


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    """Shortest of some times, and the memory that one adds at its highest, gradients included."""
    torch.manual_seed(0)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, case["dtype"])
    hidden = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, HIDDEN, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), device=device)

    def once() -> float:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        total = WAYS[case["way"]](hidden, weight, labels)
        total.backward()
        total.item()  # waits for the GPU
        return time.perf_counter() - start

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        once()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with measure.PeakMemory() as memory:
            once()
        peak = memory.added_bytes
    return {"seconds": round(min(once() for _ in range(REPEATS)), 3), "peak_mib": round(peak / measure.MIB)}


def main() -> None:
    rows = []
    for dtype in DTYPES:
        ways = {way: measure.in_fresh_process(__file__, {"dtype": dtype, "way": way}) for way in WAYS}
        rows.append({"dtype": dtype, **ways})
        print(rows[-1], flush=True)
    result = {
        "what": "output layer and loss, forward and backward",
        "shape": {"vocabulary": VOCABULARY, "hidden": HIDDEN, "tokens": TOKENS, "chunk_tokens": CHUNK_TOKENS},
        "rows": rows,
    }
    name = "loss_gpu.json" if torch.cuda.is_available() else "loss.json"
    measure.write_result(Path(__file__).with_name(name), result)


if __name__ == "__main__":
    measure.run(__doc__, measure_case, main)
