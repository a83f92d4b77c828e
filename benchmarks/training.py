"""One whole training step beside transformers: tokens per second and peak memory on this machine's CPU.

The same weights, the same documents and the same AdamW (one micro-batch, loss over all targets, clip 1.0), fp32:

- ours: the documents packed, `train_step`
- unpacked: transformers, one document after another, gradients accumulated
- masked: transformers, the documents packed under a block-diagonal causal mask

    python benchmarks/training.py          # writes benchmarks/training.json
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from attention import block_diagonal, document_lengths

WAYS = ("ours", "unpacked", "masked")
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
LR = 1e-4


def documents(case: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = document_lengths(case["tokens"], case["documents"])
    return [torch.randint(MODEL["vocab_size"], (length,), generator=generator) for length in lengths]


def transformers_step(case: dict[str, Any], docs: list[torch.Tensor]) -> Callable[[], float]:
    """A plain PyTorch loop over transformers' Llama; the step returns the mean loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(case["checkpoints"]) / "hf", dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    num_targets = sum(len(document) - 1 for document in docs)
    cu_seqlens = [0, *accumulate(len(document) for document in docs)]

    def sum_of_losses(logits_TV: torch.Tensor, document_labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_TV, document_labels, reduction="sum")

    def unpacked() -> float:
        total = 0.0
        for document in docs:
            logits_TV = model(document[None], use_cache=False).logits[0, :-1]
            loss = sum_of_losses(logits_TV, document[1:]) / num_targets
            loss.backward()
            total += float(loss.detach())
        return total

    def masked() -> float:
        tokens = torch.cat(docs)
        labels = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in docs])
        positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(cu_seqlens)])
        mask = block_diagonal(cu_seqlens)[None, None]
        out = model(tokens[None], attention_mask=mask, position_ids=positions[None], use_cache=False)
        loss = sum_of_losses(out.logits[0], labels) / num_targets
        loss.backward()
        return float(loss.detach())

    def step() -> float:
        optimizer.zero_grad()
        loss = unpacked() if case["way"] == "unpacked" else masked()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def measure_ours(case: dict[str, Any], docs: list[torch.Tensor]) -> dict[str, Any]:
    from megatron_prolong.data.batch import collate_pieces
    from megatron_prolong.data.packed import Piece
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.checkpoint import load_weights
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.micro_batch import micro_batch
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.recipe.schema import Layout, OptimizerSpec
    from megatron_prolong.recipe.shape import read_shape
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.training.step import train_step

    layout, spec = Layout(), OptimizerSpec()
    with distributed() as world, megatron(layout, seed=1) as groups:
        checkpoint = Path(case["checkpoints"]) / "megatron"
        model = build_model(read_shape(checkpoint), layout, precision="fp32")
        load_weights(checkpoint, model)
        optimizer = build_optimizer(model, spec, layout, lr=LR)
        batch = collate_pieces(Piece(document.numpy().astype("uint32"), None) for document in docs)
        batches = [micro_batch(batch, groups=groups, layout=layout, device=world.device)]
        return measure_step(
            case, lambda: train_step(model, optimizer, batches, groups, spec=spec, lr=LR).loss
        )


def measure_step(case: dict[str, Any], step: Callable[[], float]) -> dict[str, Any]:
    with measure.PeakMemory() as memory:
        first_loss = step()
        step_seconds = measure.seconds(step, repeats=case["repeats"])
    return {
        "tokens_per_second": round(case["tokens"] / step_seconds),
        "peak_mib": round(memory.added_bytes / measure.MIB),
        "loss": round(first_loss, 5),
    }


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    docs = documents(case)
    if case["way"] == "ours":
        return measure_ours(case, docs)
    return measure_step(case, transformers_step(case, docs))


def make_checkpoints(directory: Path) -> None:
    """The same random weights for both sides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_prolong.convert.to_megatron import to_megatron

    torch.manual_seed(0)
    config = LlamaConfig(
        **MODEL, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 8e6}
    )
    LlamaForCausalLM(config).save_pretrained(directory / "hf")
    to_megatron(directory / "hf", directory / "megatron")


def measure_row(checkpoints: str, shape: str, tokens: int) -> dict[str, Any]:
    row: dict[str, Any] = {"documents": shape, "tokens": tokens}
    row["num_documents"] = len(document_lengths(tokens, shape))
    for way in WAYS:
        if shape == "one" and way == "masked":
            continue  # nothing to mask
        case = {"way": way, "documents": shape, "tokens": tokens, "checkpoints": checkpoints}
        case["repeats"] = 1 if way == "masked" and tokens > 2048 else 5  # minutes a step
        row[way] = measure.in_fresh_process(__file__, case)
    losses = [row[way]["loss"] for way in WAYS if "loss" in row.get(way, {})]
    assert max(losses) - min(losses) < 1e-3, f"the ways do not compute the same: {losses}"
    for way in WAYS[1:]:
        if "loss" in row.get(way, {}):
            ratio = row["ours"]["tokens_per_second"] / row[way]["tokens_per_second"]
            row[f"speedup over {way}"] = round(ratio, 2)
    return row


def main() -> None:
    rows = []
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoints(Path(directory))
        for shape, lengths in {"short": (2048, 8192, 16384), "one": (2048, 8192)}.items():
            for tokens in lengths:
                rows.append(measure_row(directory, shape, tokens))
                print(json.dumps(rows[-1]), flush=True)
                write(rows)  # after every row: the long ones take minutes


def write(rows: list[dict[str, Any]]) -> None:
    measure.write_result(
        Path(__file__).with_suffix(".json"),
        {
            "what": "one AdamW step, fastest of several; peak of the memory it adds",
            "model": MODEL,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    measure.run(__doc__, measure_case, main)
