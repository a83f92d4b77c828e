"""Which layouts can run a stage: everything Megatron-Core 0.16.1, Transformer Engine or our own context
parallelism would refuse later, on the first of many GPUs, as plain arithmetic.

Only the model and the number of ranks must be divisible. Lengths and batches need not be: documents, not packed
sequences, are dealt to the ranks, their slices are padded, and empty micro-batches fill up an interleaved schedule.

The planner asks the same function why a layout is impossible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_prolong.recipe.schema import Layout, Precision
from megatron_prolong.recipe.shape import ModelShape


@dataclass(frozen=True)
class LayoutProblem:
    """A field of the layout (or "world_size") that cannot be as it is, and the rule it breaks."""

    field: str
    rule: str


def layout_problems(
    layout: Layout, shape: ModelShape | None, world_size: int | None, precision: Precision = "bf16"
) -> list[LayoutProblem]:
    """Everything that keeps `layout` from running; rules about an unknown shape or world are skipped."""
    problems = list(_pipeline(layout))
    if shape is not None:
        problems += [*_tensor(layout, shape), *_layers(layout, shape), *_exchange(layout, shape)]
        if precision == "fp8":
            problems += _fp8(layout, shape)
    if world_size is not None and world_size % layout.model_ranks:
        rule = f"{world_size} ranks cannot be divided into copies of tp·pp·cp = {layout.model_ranks} ranks"
        problems.append(LayoutProblem("world_size", rule))
    return problems


class OptimizerForm(NamedTuple):
    """What decides which tensors an optimizer's saved state has."""

    sharded: bool
    precision: Precision

    @classmethod
    def saved_in(cls, manifest: Mapping[str, Any]) -> OptimizerForm | None:
        """That of a checkpoint, from what it says about itself; None where it is of weights alone."""
        if manifest["kind"] != "training":
            return None
        precision: Precision = "fp32" if manifest["dtype"] == "float32" else "bf16"
        return cls(manifest["layout"]["distributed_optimizer"], precision)


def carry_problem(saved: OptimizerForm | None, own: OptimizerForm) -> str | None:
    """How an optimizer's saved state cannot be continued in the form asked for. None where it can, or where none is
    saved; any other change of layout is fine.

    Megatron's sharded and unsharded optimizers have files of their own. Unsharded, the optimizer of fp32 weights
    (FP32Optimizer) has no main weights, and that of bf16 ones (Float16OptimizerWithFloat16Params) needs them.
    """
    if saved is None:
        return None
    if saved.sharded != own.sharded:
        before, here = str(saved.sharded).lower(), str(own.sharded).lower()
        return f"saved with layout.distributed_optimizer: {before} and continued with {here}"
    if not own.sharded and "fp32" in (saved.precision, own.precision) and saved.precision != own.precision:
        change = f"saved in {saved.precision} and continued in {own.precision}"
        return f"{change} without layout.distributed_optimizer"
    return None


def head_ranks(exchange: str, cp: int) -> int:
    """Over how many context-parallel ranks the exchange spreads the heads of a document that is split."""
    if cp == 1 or "a2a" not in exchange:
        return 1
    return 2 if exchange == "a2a+p2p" else cp  # heads are exchanged within pairs, the ring runs over these


def kv_repeats(exchange: str, cp: int, kv_heads: int) -> int:
    """How often a rank's key/value heads are repeated so that each rank of the all-to-all gets whole ones."""
    return math.lcm(kv_heads, head_ranks(exchange, cp)) // kv_heads


def te_exchanges(exchange: str, cp: int, kv_heads: int) -> bool:
    """Whether Transformer Engine does this exchange for packed documents itself; otherwise ours does.

    TE 2.12 asserts qkv_format != "thd" in all_gather and a2a+p2p, and repeats no key/value heads
    (context_parallel.py).
    """
    return exchange in ("p2p", "a2a") and kv_repeats(exchange, cp, kv_heads) == 1


def _pipeline(layout: Layout) -> Iterator[LayoutProblem]:
    if layout.virtual_pp > 1 and layout.pp == 1:  # parallel_state.initialize_model_parallel
        yield LayoutProblem("virtual_pp", "needs pp of at least 2; set pp, or virtual_pp to 1")
    for field in ("first_stage_layers", "last_stage_layers"):
        if getattr(layout, field) is not None and layout.pp == 1:
            yield LayoutProblem(field, "needs pp of at least 2: with pp 1 the one stage has every layer")
    both = layout.first_stage_layers is not None and layout.last_stage_layers is not None
    if both and layout.pp == 2 and layout.virtual_pp > 1:  # Megatron divides by the number of other stages
        rule = "goes with first_stage_layers and virtual_pp only from pp 3 on; leave it out, it follows from them"
        yield LayoutProblem("last_stage_layers", rule)


def _tensor(layout: Layout, shape: ModelShape) -> Iterator[LayoutProblem]:
    divided = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "ffn_hidden_size": shape.ffn_hidden_size,
    }
    if wrong := [f"{name} {value}" for name, value in divided.items() if value % layout.tp]:
        yield LayoutProblem("tp", f"must divide the model's {' and '.join(wrong)}")


def _layers(layout: Layout, shape: ModelShape) -> Iterator[LayoutProblem]:
    stages = layout.stage_layers(shape.num_layers)
    if stages is None:
        rule = (
            f"must divide the model's {shape.num_layers} layers (what first_stage_layers and last_stage_layers "
            "leave of them, over the other stages)"
        )
        yield LayoutProblem("pp", rule)
    elif uneven := [layers for layers in stages if layers % layout.virtual_pp]:
        yield LayoutProblem("virtual_pp", f"must divide the {uneven[0]} layers of a pipeline rank")


def _exchange(layout: Layout, shape: ModelShape) -> Iterator[LayoutProblem]:
    exchange, cp = layout.cp_exchange, layout.cp
    if cp == 1 or "a2a" not in exchange:
        return
    if exchange == "a2a+p2p" and (cp < 4 or cp % 2):
        yield LayoutProblem("cp_exchange", f"a2a+p2p needs an even cp of at least 4, not {cp}")
    elif shape.num_heads % layout.tp == 0 and shape.num_kv_heads % layout.tp == 0:
        heads, kv_heads = shape.num_heads // layout.tp, shape.num_kv_heads // layout.tp
        if heads % (whole := kv_heads * kv_repeats(exchange, cp, kv_heads)):
            yield LayoutProblem(
                "cp_exchange",
                f"{exchange} at cp {cp} needs num_heads / tp, {heads}, to be a multiple of {whole}, the "
                f"{kv_heads} key/value heads repeated for every rank; use p2p or all_gather, or a smaller cp",
            )


def _fp8(layout: Layout, shape: ModelShape) -> Iterator[LayoutProblem]:
    """FP8 products work on tiles of 16 and mxfp8 on blocks of 32, along both sides of every weight; no Llama is so
    narrow that one rule would refuse what the other allows. (The tokens of a rank are padded.)"""
    widths = {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size / tp": shape.ffn_hidden_size // layout.tp,
        "num_heads · head_dim / tp": shape.num_heads * shape.head_dim // layout.tp,
    }
    for name, width in widths.items():
        if width % 32:
            yield LayoutProblem("tp", f"fp8 needs {name} to be a multiple of 32, but it is {width}")
