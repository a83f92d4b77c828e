"""Peak memory of output layer and loss, forward and backward, as the sequence grows: chunked against dense.

Small width, Llama 3's vocabulary, fp32: what grows with the sequence is logits (dense) or hidden states and a few
numbers per token (chunked). A measurement may use 10 GiB.

    python benchmarks/loss_memory.py        # writes benchmarks/loss_memory.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import measure
import torch

from megatron_prolong.model.cross_entropy import chunked_cross_entropy

VOCABULARY, HIDDEN_SIZE, CHUNK_TOKENS = 128_256, 16, 1024
MEMORY_LIMIT_BYTES = 10 * 2**30
KIB_TOKENS = (1, 2, 4, 8, 16, 64, 256)


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    measure.limit_memory(MEMORY_LIMIT_BYTES)
    torch.manual_seed(0)
    hidden = (0.1 * torch.randn(case["tokens"], HIDDEN_SIZE)).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN_SIZE).requires_grad_()
    labels = torch.randint(VOCABULARY, (case["tokens"],))
    start = time.perf_counter()
    with measure.PeakMemory() as memory:
        if case["way"] == "chunked":
            losses = chunked_cross_entropy(hidden, weight, labels, 0, VOCABULARY, CHUNK_TOKENS)
            loss = losses.mean()
        else:
            loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
        loss.backward()
    return {
        "peak_mib": round(memory.added_bytes / measure.MIB, 1),
        "seconds": round(time.perf_counter() - start, 2),
        "loss": round(float(loss.detach()), 4),
        "hidden_grad_norm": round(float(hidden.grad.norm()), 6),
    }


def main() -> None:
    rows: list[dict[str, Any]] = []
    dense_fits = True
    for tokens in (kib * 1024 for kib in KIB_TOKENS):
        row: dict[str, Any] = {"tokens": tokens}
        for way in ("chunked", "dense"):
            if way == "chunked" or dense_fits:
                row[way] = measure.in_fresh_process(__file__, {"way": way, "tokens": tokens}, 3600)
        dense_fits = "peak_mib" in row.get("dense", {})
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(rows)  # after every length: the long ones take their time


def write(rows: list[dict[str, Any]]) -> None:
    slopes = {way: slope_kib_per_token(rows, way) for way in ("chunked", "dense")}
    measure.write_result(
        Path(__file__).with_suffix(".json"),
        {
            "what": "output layer and cross entropy, forward and backward, fp32, memory added at the highest",
            "vocabulary": VOCABULARY,
            "hidden_size": HIDDEN_SIZE,
            "chunk_tokens": CHUNK_TOKENS,
            "memory_limit_gib": MEMORY_LIMIT_BYTES / 2**30,
            "slope_kib_per_token": slopes,
            "rows": rows,
        },
    )


def slope_kib_per_token(rows: list[dict[str, Any]], way: str) -> float | None:
    """Of peak memory, from the first length of at least two chunks (shorter ones hold fewer temporaries)."""
    points = [(row["tokens"], row[way]["peak_mib"] * 1024) for row in rows if "peak_mib" in row.get(way, {})]
    settled = [point for point in points if way == "dense" or point[0] >= 2 * CHUNK_TOKENS]
    if len(settled) < 2:
        return None
    (first_tokens, first_kib), (last_tokens, last_kib) = settled[0], settled[-1]
    return round((last_kib - first_kib) / (last_tokens - first_tokens), 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=json.loads, help="one measurement, as JSON")
    arguments = parser.parse_args()
    print(json.dumps(measure_case(arguments.case))) if arguments.case else main()
