"""Training speed and memory of Llama-3-8B-shaped layers on one GPU, beside transformers, in one command.

    python benchmarks/gpu/throughput.py         # writes benchmarks/gpu/throughput.json
    python benchmarks/gpu/throughput.py --tiny  # a toy shape on any machine, to see that it runs; writes nothing

An 8B model with its optimizer does not fit one GPU, so each case takes whole training steps (forward, backward,
clip, AdamW) of the real embedding and output layer with few layers and with more. The difference is the time of a
layer, and what 32 of them would take is extrapolated and labelled so. FLOPs are document-aware: attention
counts Σ len² inside documents, and recomputation does not count (MFU, not HFU).

- native: our layers on PyTorch's kernels, bf16
- te: our layers on Transformer Engine, bf16
- te fp8: the same with FP8 matrix products
- transformers: Llama with SDPA, one document after another, gradient checkpointing, torch's fused AdamW, bf16
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure
from shapes import LLAMA3_8B

from megatron_prolong.plan.flops import model_flops
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K, LengthMixture, single_document
from megatron_prolong.recipe.shape import ModelShape

WAYS = ("native", "te", "te fp8", "transformers")
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}  # dense, data sheets
PROLONG_8B = LLAMA3_8B.replace(max_length=524_288, rope_base=1.28e8)
TINY = PROLONG_8B.replace(
    hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=256
)


def numbers_of_layers(mixture: str) -> tuple[int, int]:
    """Of the two measurements; four layers at 512K would take 135 GiB."""
    return (2, 3) if "512K" in mixture else (2, 4)


def mixtures(tiny: bool) -> dict[str, LengthMixture]:
    if tiny:
        return {"one document": single_document(256)}
    return {
        "one document, 8K": single_document(8192),
        "ProLong 64K": PROLONG_64K,
        "one document, 64K": single_document(65_536),
        "one document, 128K": single_document(131_072),
        "ProLong 512K": PROLONG_512K,
        "one document, 512K": single_document(524_288),
    }


def documents(case: dict[str, Any], shape: ModelShape) -> list[torch.Tensor]:
    """One packed sequence: of a mixture, the one whose Σ len² is nearest to the mean."""
    sequences = mixtures(case["tiny"])[case["mixture"]].sample(64)
    squares = [int((lengths**2).sum()) for lengths in sequences]
    typical = min(range(64), key=lambda index: abs(squares[index] - sum(squares) / 64))
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(shape.vocab_size, (int(length),), generator=generator) for length in sequences[typical]
    ]


def our_step(
    case: dict[str, Any], shape: ModelShape, docs: list[torch.Tensor], stack: Any
) -> Callable[[], float]:
    from megatron_prolong.mcore import config, specs
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.recipe.schema import Layout
    from megatron_prolong.runtime.launch import distributed

    if case["way"] == "native":
        specs.runs_on_transformer_engine = config.runs_on_transformer_engine = lambda dtype: False
    precision = "fp8" if case["way"] == "te fp8" else "bf16" if torch.cuda.is_available() else "fp32"
    world = stack.enter_context(distributed())
    groups = stack.enter_context(megatron(Layout(), seed=1))
    return training_step(shape, Layout(), [docs], groups, world.device, precision=precision, recompute="full")


def training_step(
    shape: ModelShape,
    layout: Any,
    micro_batches: list[list[torch.Tensor]],
    groups: Any,
    device: torch.device,
    *,
    precision: str,
    recompute: str,
    offload: bool = False,
    split_threshold_tokens: int = 0,
) -> Callable[[], float]:
    """A whole step of a model with random weights, over the documents of each micro-batch; returns the loss."""
    from megatron_prolong.data.batch import collate_pieces
    from megatron_prolong.data.packed import Piece
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.micro_batch import micro_batch
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.recipe.fp8 import TOKEN_MULTIPLE
    from megatron_prolong.recipe.schema import OptimizerSpec
    from megatron_prolong.training.step import train_step

    spec = OptimizerSpec()
    tokens = max(sum(len(document) for document in docs) for docs in micro_batches)
    model = build_model(
        shape, layout, precision=precision, recompute=recompute, offload_activations=offload,
        rank_tokens=tokens // layout.cp,
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.bare_chunks[0].parameters():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1.0)
    optimizer = build_optimizer(model, spec, layout, lr=1e-5)
    batches = [
        micro_batch(
            collate_pieces(Piece(document.numpy().astype("uint32"), None) for document in docs),
            groups=groups, layout=layout, device=device, split_threshold_tokens=split_threshold_tokens,
            token_multiple=TOKEN_MULTIPLE if precision == "fp8" else 1,
        )
        for docs in micro_batches
    ]  # fmt: skip
    return lambda: train_step(model, optimizer, batches, groups, spec=spec, lr=1e-5).loss


def transformers_step(shape: ModelShape, docs: list[torch.Tensor]) -> Callable[[], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_length,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    targets = sum(len(document) - 1 for document in docs)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for document in docs:
            tokens = document.to(device)[None]
            logits = model(tokens, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    from contextlib import ExitStack

    shape = (TINY if case["tiny"] else PROLONG_8B).replace(num_layers=case["layers"])
    docs = documents(case, shape)
    with ExitStack() as stack:
        peer = case["way"] == "transformers"
        step = transformers_step(shape, docs) if peer else our_step(case, shape, docs, stack)
        loss = step()
        times = []
        for _ in range(case["repeats"]):
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": min(times), "loss": round(loss, 4), "peak_gib": round(peak / 2**30, 2)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_row(mixture: str, way: str, tiny: bool) -> dict[str, Any]:
    case: dict[str, Any] = {"mixture": mixture, "way": way, "tiny": tiny, "repeats": 1 if tiny else 3}
    num_few, num_more = numbers_of_layers(mixture)
    few, more = (
        measure.in_fresh_process(__file__, {**case, "layers": layers}) for layers in (num_few, num_more)
    )
    row: dict[str, Any] = {"mixture": mixture, "way": way}
    if "failed" in few or "failed" in more:
        return {**row, "failed": few.get("failed") or more.get("failed")}
    shape = TINY if tiny else PROLONG_8B
    lengths = [len(document) for document in documents(case, shape)]
    layer = (more["seconds"] - few["seconds"]) / (num_more - num_few)
    whole = few["seconds"] + (shape.num_layers - num_few) * layer
    flops = model_flops(shape, sum(lengths), sum(length**2 for length in lengths)) / whole
    row |= {
        "tokens": sum(lengths),
        "documents": len(lengths),
        "layers": [num_few, num_more],
        "seconds": [round(few["seconds"], 4), round(more["seconds"], 4)],
        "peak_gib": [few["peak_gib"], more["peak_gib"]],
        "tokens_per_second, 32 layers extrapolated": round(sum(lengths) / whole),
        "tflops": round(flops / 1e12, 1),
        "loss": more["loss"],
    }
    if (peak := peak_flops()) is not None:
        row["mfu"] = round(flops / peak, 3)
    return row


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for gpu, flops in PEAK_BF16_FLOPS.items() if gpu in name), None)


def main(tiny: bool) -> None:
    rows = []
    for mixture in mixtures(tiny):
        for way in ("native", "transformers") if tiny else WAYS:
            rows.append(measure_row(mixture, way, tiny))
            print(json.dumps(rows[-1]), flush=True)
    if not tiny:
        measure.write_result(
            Path(__file__).with_suffix(".json"),
            {"what": "one packed sequence per step, full recomputation, one GPU", "rows": rows},
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=json.loads, help="one measurement, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to see that it runs")
    arguments = parser.parse_args()
    print(json.dumps(measure_case(arguments.case))) if arguments.case else main(arguments.tiny)
