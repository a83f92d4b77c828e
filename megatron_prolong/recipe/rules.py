"""Rules between the values of a recipe that its text alone can break. Loading refuses a recipe that breaks one, so
all other code may rely on them; files and the cluster's size are judged in validate.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megatron_prolong.recipe.fp8 import fp8_parameters_problem
from megatron_prolong.recipe.numbers import steps_of
from megatron_prolong.recipe.run_files import RESERVED_STAGE_NAMES
from megatron_prolong.recipe.schema import (
    CheckpointSpec,
    InitSpec,
    ModelSpec,
    Recipe,
    Stage,
    settings_of,
)
from megatron_prolong.recipe.source import Key


class Broken(NamedTuple):
    """A rule that `key` breaks, and the other keys it was judged by."""

    key: Key
    rule: str
    uses: tuple[Key, ...] = ()


def broken_rules(recipe: Recipe) -> Iterator[Broken]:
    """Every rule that the recipe's text breaks."""
    yield from model_rules(recipe.model)
    yield from _checkpoint(recipe.checkpoint)
    if recipe.evaluation and recipe.evaluation.suite == "none" and not recipe.evaluation.held_out:
        yield Broken(("evaluation", "suite"), "found none; without held_out there is nothing to measure")
    yield from _names(recipe)
    yield from _fp8_parameters(recipe)
    for index, stage in enumerate(recipe.stages):
        key = ("stages", stage.name)
        yield from _carry(key, stage, starts_from_path=index == 0 and recipe.model.path is not None)
        yield from _budget(key, stage)
        yield from _skipped(key, stage)
        yield from _lengths(key, stage)
        yield from _yarn(key, stage)
        yield from _mixture(key, stage)


def model_rules(model: ModelSpec) -> Iterator[Broken]:
    """Those of where the weights come from."""
    if (model.path is None) == (model.init is None):
        found = "neither" if model.path is None else "both"
        yield Broken(("model",), f"found {found} of path and init; give one")
    if model.init is not None:
        yield from _init(model.init)
        if model.tokenizer is None:
            yield Broken(("model", "tokenizer"), "required with init: it sets the vocabulary size")


def _init(init: InitSpec) -> Iterator[Broken]:
    key = ("model", "init")
    if init.hidden_size % init.num_heads:
        rule = f"found {init.num_heads}; must divide hidden_size, {init.hidden_size}"
        yield Broken((*key, "num_heads"), rule, ((*key, "hidden_size"),))
    if init.num_heads % init.num_kv_heads:
        rule = f"found {init.num_kv_heads}; must divide num_heads, {init.num_heads}"
        yield Broken((*key, "num_kv_heads"), rule, ((*key, "num_heads"),))


def _checkpoint(spec: CheckpointSpec) -> Iterator[Broken]:
    if spec.keep_every is not None and spec.keep_every % spec.every:
        rule = f"found {spec.keep_every}; must be a multiple of checkpoint.every, {spec.every}"
        yield Broken(("checkpoint", "keep_every"), rule, (("checkpoint", "every"),))


def _names(recipe: Recipe) -> Iterator[Broken]:
    for name, count in Counter(stage.name for stage in recipe.stages).items():
        if count > 1:
            yield Broken(("stages", name), f"{count} stages have this name; names must be unique")
        if name in RESERVED_STAGE_NAMES:
            reserved = ", ".join(RESERVED_STAGE_NAMES)
            yield Broken(("stages", name, "name"), f"found {name}; {reserved} are reserved: rename it")


def _fp8_parameters(recipe: Recipe) -> Iterator[Broken]:
    if not recipe.fp8_parameters:
        return
    every = [settings_of(recipe, stage) for stage in recipe.stages]
    if not any(settings.precision == "fp8" for settings in every):
        yield Broken(("fp8_parameters",), "found true; needs precision: fp8", (("precision",),))
    for settings in every:
        sharded = settings.layout.distributed_optimizer
        problem = fp8_parameters_problem(recipe.fp8_recipe, distributed_optimizer=sharded)
        if problem and settings.precision == "fp8":
            yield Broken(("fp8_parameters",), f"found true; {problem}")


def _carry(key: Key, stage: Stage, *, starts_from_path: bool) -> Iterator[Broken]:
    if stage.carry.weights:
        return
    if starts_from_path:
        rule = "found false; the first stage starts from model.path: use model.init for random weights"
        yield Broken((*key, "carry", "weights"), rule)
    elif stage.carry.optimizer:
        rule = "found true; moments of other weights are of no use: carry both or neither"
        yield Broken((*key, "carry", "optimizer"), rule)


def _budget(key: Key, stage: Stage) -> Iterator[Broken]:
    if not stage.has_budget:
        found = "neither" if stage.steps is None else "both"
        yield Broken(key, f"found {found} of steps and tokens; give one", ((*key, "steps"), (*key, "tokens")))


def _skipped(key: Key, stage: Stage) -> Iterator[Broken]:
    last = stage.num_steps if stage.has_budget else math.inf
    for steps in steps_of(stage.skip_steps or ""):
        if not steps or steps[-1] > last:
            rule = f"found {steps.start}-{steps.stop - 1}; must be steps of the stage, 1 to {last}, in their order"
            yield Broken((*key, "skip_steps"), rule, ((*key, "steps"), (*key, "tokens")))


def _lengths(key: Key, stage: Stage) -> Iterator[Broken]:
    uses = ((*key, "sequence_length"),)
    if stage.batch_tokens % stage.sequence_length:
        rule = f"found {stage.batch_tokens}; must be a multiple of sequence_length, {stage.sequence_length}"
        yield Broken((*key, "batch_tokens"), rule, uses)
    if stage.micro_batch_length < stage.sequence_length:
        rule = f"found {stage.micro_batch_tokens}; must hold at least one sequence of {stage.sequence_length}"
        yield Broken((*key, "micro_batch_tokens"), rule, uses)


def _yarn(key: Key, stage: Stage) -> Iterator[Broken]:
    if stage.yarn and stage.yarn.beta_fast <= stage.yarn.beta_slow:
        rule = f"found {stage.yarn.beta_fast:g}; must be above beta_slow, {stage.yarn.beta_slow:g}"
        yield Broken((*key, "yarn", "beta_fast"), rule, ((*key, "yarn", "beta_slow"),))


def _mixture(key: Key, stage: Stage) -> Iterator[Broken]:
    here, uses = (*key, "mixture"), ((*key, "mixture"),)
    if stage.mixture == "mock":
        if stage.loss_mask:
            yield Broken((*key, "loss_mask"), "found true; mock data has no mask column", uses)
    elif not stage.mixture:
        yield Broken(here, "found no directory; name at least one, or write the word mock", uses)
    elif abs((total := math.fsum(stage.mixture.values())) - 1) > 1e-6:
        yield Broken(here, f"the proportions sum to {total:.6g}; they must sum to 1", uses)
