"""Peak memory of one whole training step as the sequence grows: linear, with no logits in it.

A narrow Llama of one layer, Llama 3's vocabulary, fp32, documents of 2K tokens, full recomputation: what could grow
faster than the sequence would be logits or scores. A measurement may use 14 GiB.

- chunked: our step, 1024 tokens of logits at a time
- unchunked: our step, one chunk of the whole sequence
- transformers: Llama with gradient checkpointing, the packed sequence with restarting positions, its own loss

    python benchmarks/step_memory.py        # writes benchmarks/step_memory.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import measure
import torch

from megatron_prolong.recipe.shape import ModelShape

MEMORY_LIMIT_BYTES = 14 * 2**30
DOCUMENT_TOKENS, CHUNK_TOKENS = 2048, 1024
KIB_TOKENS = (4, 16, 64, 256)
WAYS = ("chunked", "unchunked", "transformers")
SHAPE = ModelShape(
    num_layers=1, hidden_size=32, ffn_hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=128_256,
    max_length=262_144, rope_base=8e6, tie_embeddings=False, norm_eps=1e-5, initializer_range=0.02,
)  # fmt: skip


def our_case(tokens: int, loss_chunk_tokens: int) -> dict[str, Any]:
    from megatron_prolong.data.batch import collate_pieces
    from megatron_prolong.data.packed import Piece
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.micro_batch import micro_batch
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.recipe.schema import Layout, OptimizerSpec
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.training.step import train_step

    layout, spec = Layout(), OptimizerSpec()
    with distributed() as world, megatron(layout, seed=1) as groups:
        model = build_model(
            SHAPE, layout, precision="fp32", recompute="full", loss_chunk_tokens=loss_chunk_tokens
        )
        with torch.no_grad():
            for weight in model.bare_chunks[0].parameters():
                weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1.0)
        optimizer = build_optimizer(model, spec, layout, lr=1e-5)
        pieces = (Piece(document.numpy().astype("uint32"), None) for document in documents(tokens))
        batch = collate_pieces(pieces)
        batches = [micro_batch(batch, groups=groups, layout=layout, device=world.device)]
        return step_memory(lambda: train_step(model, optimizer, batches, groups, spec=spec, lr=1e-5).loss)


def transformers_case(tokens: int) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.hidden_size, intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers, num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads, max_position_embeddings=SHAPE.max_length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    packed = torch.cat(documents(tokens))[None]
    positions = torch.arange(DOCUMENT_TOKENS).repeat(tokens // DOCUMENT_TOKENS)[None]

    def step() -> float:
        loss = model(packed, labels=packed, position_ids=positions, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step_memory(step)


def documents(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(SHAPE.vocab_size, (tokens,), generator=generator).split(DOCUMENT_TOKENS))


def step_memory(step: Any) -> dict[str, Any]:
    start = time.perf_counter()
    with measure.PeakMemory() as memory:
        loss = step()
    return {
        "peak_mib": round(memory.added_bytes / measure.MIB, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(loss, 4),
    }


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    measure.limit_memory(MEMORY_LIMIT_BYTES)
    if case["way"] == "transformers":
        return transformers_case(case["tokens"])
    return our_case(case["tokens"], CHUNK_TOKENS if case["way"] == "chunked" else case["tokens"])


def main() -> None:
    rows: list[dict[str, Any]] = []
    alive = set(WAYS)
    for tokens in (kib * 1024 for kib in KIB_TOKENS):
        row: dict[str, Any] = {"tokens": tokens}
        for way in (way for way in WAYS if way in alive):
            row[way] = measure.in_fresh_process(__file__, {"way": way, "tokens": tokens}, 3600)
            if "failed" in row[way]:
                alive.discard(way)  # longer ones would fail too
        rows.append(row)
        print(json.dumps(row), flush=True)
    first, last = rows[1], rows[-1]
    slope = (last["chunked"]["peak_mib"] - first["chunked"]["peak_mib"]) / (last["tokens"] - first["tokens"])
    measure.write_result(
        Path(__file__).with_suffix(".json"),
        {
            "what": "one training step, memory it adds at the highest",
            "shape": SHAPE.to_dict(),
            "memory_limit_gib": MEMORY_LIMIT_BYTES / 2**30,
            "chunked: kib per token": round(slope * 1024, 3),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    measure.run(__doc__, measure_case, main)
