"""Which layouts can run a stage: everything Megatron-Core 0.16.1, Transformer Engine or our own context
parallelism would refuse later, on the first of many GPUs, as plain arithmetic.

The planner asks the same function why a layout is impossible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prolong.recipe.schema import Layout, Precision
from megatron_prolong.recipe.shape import ModelShape


@dataclass(frozen=True)
class LayoutProblem:
    """A field of the layout (or "world_size") that cannot be as it is, and the rule it breaks."""

    field: str
    rule: str


@dataclass(frozen=True)
class StageSize:
    """What a layout has to divide: lengths in tokens, the global batch in packed sequences."""

    sequence_length: int
    batch_sequences: int
    precision: Precision = "bf16"


def layout_problems(
    layout: Layout, shape: ModelShape | None, size: StageSize, world_size: int | None
) -> list[LayoutProblem]:
    """Everything that keeps `layout` from running; rules about an unknown shape or world are skipped."""
    problems = [*_pipeline(layout), *_sequence(layout, size)]
    if shape is not None:
        problems += [*_tensor(layout, shape), *_layers(layout, shape), *_exchange(layout, shape)]
        if size.precision == "fp8":
            problems += _fp8(layout, shape, size)
    if world_size is not None:
        problems += _world(layout, size, world_size)
    return problems


def _pipeline(layout: Layout) -> Iterator[LayoutProblem]:
    if layout.virtual_pp > 1 and layout.pp == 1:  # parallel_state.initialize_model_parallel
        yield LayoutProblem("virtual_pp", "needs pp of at least 2; set pp, or virtual_pp to 1")
    for field in ("first_stage_layers", "last_stage_layers"):
        if getattr(layout, field) is not None and layout.pp == 1:
            yield LayoutProblem(field, "needs pp of at least 2: with pp 1 the one stage has every layer")


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


def _sequence(layout: Layout, size: StageSize) -> Iterator[LayoutProblem]:
    length = size.sequence_length
    if layout.cp > 1 and length % (2 * layout.cp):  # each rank holds chunks r and 2·cp−1−r
        yield LayoutProblem("cp", f"2·cp = {2 * layout.cp} must divide the sequence length, {length}")
    elif layout.tp > 1 and layout.sequence_parallel and length // layout.cp % layout.tp:
        rule = f"must divide the {length // layout.cp} tokens of a context-parallel rank (sequence_parallel)"
        yield LayoutProblem("tp", rule)


def _exchange(layout: Layout, shape: ModelShape) -> Iterator[LayoutProblem]:
    if layout.cp == 1 or "a2a" not in layout.cp_exchange:
        return
    ranks = layout.cp
    if layout.cp_exchange == "a2a+p2p":
        if layout.cp < 4 or layout.cp % 2:
            yield LayoutProblem("cp_exchange", f"a2a+p2p needs an even cp of at least 4, not {layout.cp}")
            return
        ranks = 2  # heads are exchanged within pairs, the ring runs over the pairs
    for name, heads in (("num_heads", shape.num_heads), ("num_kv_heads", shape.num_kv_heads)):
        if heads % layout.tp == 0 and heads // layout.tp % ranks:
            yield LayoutProblem(
                "cp_exchange",
                f"{layout.cp_exchange} gives each of {ranks} ranks whole heads, but {name} / tp is "
                f"{heads // layout.tp}; use p2p or all_gather, or a smaller cp",
            )


def _fp8(layout: Layout, shape: ModelShape, size: StageSize) -> Iterator[LayoutProblem]:
    """FP8 matrix products work on tiles of 16: both sides of every weight, and the tokens of a rank."""
    widths = {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size / tp": shape.ffn_hidden_size // layout.tp,
        "num_heads · head_dim / tp": shape.num_heads * shape.head_dim // layout.tp,
    }
    for name, width in widths.items():
        if width % 16:
            yield LayoutProblem("tp", f"fp8 needs {name} to be a multiple of 16, but it is {width}")
    if size.sequence_length // layout.cp % 16:
        rule = f"fp8 needs a multiple of 16 tokens on each rank, not {size.sequence_length // layout.cp}"
        yield LayoutProblem("cp", rule)


def _world(layout: Layout, size: StageSize, world_size: int) -> Iterator[LayoutProblem]:
    ranks = layout.model_ranks
    if world_size % ranks:
        rule = f"{world_size} ranks cannot be divided into copies of tp·pp·cp = {ranks} ranks"
        yield LayoutProblem("world_size", rule)
        return
    dp = world_size // ranks
    if size.batch_sequences % dp:
        rule = (
            f"dp = {world_size} / {ranks} = {dp} must divide the global batch of {size.batch_sequences} "
            "packed sequences; use more of tp, pp, cp, or fewer ranks"
        )
        yield LayoutProblem("world_size", rule)
    elif layout.virtual_pp > 1 and size.batch_sequences // dp % layout.pp:
        # schedules.forward_backward_pipelining_with_interleaving
        rule = (
            f"interleaving needs the {size.batch_sequences // dp} micro-batches of a data-parallel rank "
            f"to be a multiple of pp = {layout.pp}"
        )
        yield LayoutProblem("virtual_pp", rule)
