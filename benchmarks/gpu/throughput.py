"""Training speed and memory of Llama-3-8B-shaped layers on one GPU, beside transformers, in one command.

    python benchmarks/gpu/throughput.py               # writes benchmarks/gpu/throughput.json row by row; a table
    python benchmarks/gpu/throughput.py --only "64K"  # only the rows with that in their name; the others stay
    python benchmarks/gpu/throughput.py --tiny        # a toy shape on any machine, to see it run; writes nothing

An 8B model with its optimizer does not fit one GPU, so each row takes whole training steps (forward, backward,
clip, AdamW) of the real embedding and output layer with few layers and with more. The difference is the time of a
layer, and what 32 of them would take is extrapolated and labelled so. FLOPs are document-aware: attention
counts Σ len² inside documents, and recomputation does not count (MFU, not HFU).

- native: our layers on PyTorch's kernels, bf16
- te: our layers on Transformer Engine, bf16
- te fp8: the same with FP8 matrix products
- transformers: Llama with SDPA, one document after another, torch's fused AdamW, bf16; with gradient checkpointing
  from 64K tokens on, without which its activations and logits do not fit
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure
from shapes import LLAMA3_8B

from megatron_prolong.plan.flops import model_flops
from megatron_prolong.plan.hardware import Gpu, load_hardware
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K, LengthMixture, single_document
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime.gpu_environment import set_gpu_environment
from megatron_prolong.runtime.terminal import screen

WAYS = ("native", "te", "te fp8", "transformers")
PROLONG_8B = LLAMA3_8B.replace(max_length=524_288, rope_base=1.28e8)
TINY = PROLONG_8B.replace(
    hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=256
)
MOST_REPEATS, ENOUGH_SECONDS = 3, 20.0
TOKENS_PER_SECOND = "tokens_per_second, 32 layers extrapolated"


@dataclass(frozen=True)
class Load:
    """Attributes:
    lengths: of the documents.
    recompute: of our layers, as a run on H100s would: the least that fits.
    layers: of the two measurements. The first and last layer of an fp8 model are in bf16, so two in both.
    """

    lengths: LengthMixture
    recompute: str
    layers: tuple[int, int] = (2, 4)


LOADS = {
    "one document, 8K": Load(single_document(8192), "none"),
    "ProLong 64K": Load(PROLONG_64K, "none"),
    "one document, 64K": Load(single_document(65_536), "none"),
    "one document, 128K": Load(single_document(131_072), "selective"),
    "ProLong 512K": Load(PROLONG_512K, "full", (2, 3)),
    "one document, 512K": Load(single_document(524_288), "full", (2, 3)),
}
TINY_LOADS = {"one document": Load(single_document(256), "none")}


def documents(load: Load, shape: ModelShape) -> list[torch.Tensor]:
    """One packed sequence: of a mixture, the one whose Σ len² is nearest to the mean."""
    sequences = load.lengths.batch(0, 64)
    squares = [int((lengths**2).sum()) for lengths in sequences]
    typical = min(range(64), key=lambda index: abs(squares[index] - sum(squares) / 64))
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(shape.vocab_size, (int(length),), generator=generator) for length in sequences[typical]
    ]


def select_way(way: str) -> str:
    """Have the layers of this process built so; returns the precision."""
    if way == "native":
        from megatron_prolong.mcore import config, specs

        specs.runs_on_transformer_engine = config.runs_on_transformer_engine = lambda dtype: False
    else:
        import transformer_engine.pytorch  # noqa: F401 - without it the layers would be native
    return "fp8" if way == "te fp8" else "bf16" if torch.cuda.is_available() else "fp32"


def our_step(
    way: str, load: Load, shape: ModelShape, docs: list[torch.Tensor], stack: ExitStack
) -> Callable[[], float]:
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.recipe.schema import Layout
    from megatron_prolong.runtime.launch import distributed

    precision = select_way(way)
    world = stack.enter_context(distributed())
    groups = stack.enter_context(megatron(Layout(), seed=1))
    return training_step(
        shape, Layout(), [docs], groups, world.device, precision=precision, recompute=load.recompute
    )


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


def transformers_step(load: Load, shape: ModelShape, docs: list[torch.Tensor]) -> Callable[[], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_length,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype).train()
    if load.lengths.sequence_length >= 65_536:
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
    """Both numbers of layers, one after the other."""
    load = (TINY_LOADS if case["tiny"] else LOADS)[case["mixture"]]
    found = [measure_layers(case["way"], load, num, case["tiny"]) for num in load.layers]
    return {name: [one[name] for one in found] for name in found[0]}


def measure_layers(way: str, load: Load, num_layers: int, tiny: bool) -> dict[str, float]:
    shape = (TINY if tiny else PROLONG_8B).replace(num_layers=num_layers)
    docs, times = documents(load, shape), []
    with ExitStack() as stack:
        peer = way == "transformers"
        step = transformers_step(load, shape, docs) if peer else our_step(way, load, shape, docs, stack)
        loss = step()
        while len(times) < MOST_REPEATS and sum(times) < ENOUGH_SECONDS:
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    del step
    _empty_memory()
    return {"seconds": round(min(times), 4), "loss": round(loss, 4), "peak_gib": round(peak / 2**30, 2)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _empty_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_row(mixture: str, way: str, tiny: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"mixture": mixture, "way": way}
    found = measure.in_fresh_process(__file__, {**row, "tiny": tiny})
    if "failed" in found:
        return row | found
    shape, load = (TINY, TINY_LOADS[mixture]) if tiny else (PROLONG_8B, LOADS[mixture])
    lengths = [len(document) for document in documents(load, shape)]
    few, more = found["seconds"]
    layer = (more - few) / (load.layers[1] - load.layers[0])
    whole = few + (shape.num_layers - load.layers[0]) * layer
    flops = model_flops(shape, sum(lengths), sum(length**2 for length in lengths)) / whole
    row |= {"tokens": sum(lengths), "documents": len(lengths), "layers": load.layers}
    if way != "transformers":
        row["recompute"] = load.recompute
    row |= {**found, TOKENS_PER_SECOND: round(sum(lengths) / whole), "tflops": round(flops / 1e12, 1)}
    if (gpu := this_gpu()) is not None:
        row["mfu"] = round(flops / gpu.peak_flops["bf16"], 3)
    return row


def this_gpu() -> Gpu | None:
    """This machine's in the planner's table, where it is there."""
    device = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((gpu for gpu in load_hardware().values() if gpu.name.split("-")[0] in device), None)


def show(rows: list[dict[str, Any]]) -> None:
    """The table at the end; speeds beside transformers' on the same documents."""
    table = Table("mixture", "way", "tokens/s", "over transformers", "MFU", "GiB")
    peers = {row["mixture"]: row.get(TOKENS_PER_SECOND) for row in rows if row["way"] == "transformers"}
    for row in rows:
        if "failed" in row:
            table.add_row(row["mixture"], row["way"], row["failed"])
            continue
        speed, peer = row[TOKENS_PER_SECOND], peers.get(row["mixture"])
        table.add_row(
            row["mixture"], row["way"], f"{speed:,}", f"{speed / peer:.2f}" if peer else "",
            f"{row['mfu']:.1%}" if "mfu" in row else "", f"{row['peak_gib'][-1]}",
        )  # fmt: skip
    screen().print(table)


def main(only: str, tiny: bool) -> None:
    set_gpu_environment()  # for the processes that measure; transformers profits too
    rows, path = [], Path(__file__).with_suffix(".json")
    ways = WAYS if torch.cuda.is_available() else ("native", "transformers")
    for mixture in TINY_LOADS if tiny else LOADS:
        for way in ways:
            if only not in f"{mixture}, {way}":
                continue
            rows.append(measure_row(mixture, way, tiny))
            print(json.dumps(rows[-1]), flush=True)
            if not tiny:
                what = "training steps on one packed sequence, one GPU"
                measure.write_row(path, what, rows[-1], ("mixture", "way"))
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=json.loads, help="one measurement, as JSON")
    parser.add_argument("--only", default="", help="the rows with this in 'MIXTURE, WAY'")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to see that it runs")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure_case(arguments.case)))
    else:
        main(arguments.only, arguments.tiny)
