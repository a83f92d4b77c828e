"""What is wrong with a recipe here, or for a number of ranks: everything at once, before torch is imported.

What its text alone shows is in rules.py.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.findings import Findings, problems_error
from megatron_prolong.recipe.fp8 import fp8_layout_problem
from megatron_prolong.recipe.inputs import (
    mixture_problems,
    model_problems,
    stages_behind,
    tokenizer_fingerprint,
    tokenizer_problems,
    unfinished_stage,
    vocabulary_size,
)
from megatron_prolong.recipe.layout_rules import OptimizerForm, carry_problem, layout_problems
from megatron_prolong.recipe.rules import broken_rules, model_rules
from megatron_prolong.recipe.run_files import (
    INITIAL,
    RESOLVED_RECIPE,
    SIDECAR,
    complete_checkpoints,
    history,
    nearest_existing,
)
from megatron_prolong.recipe.schema import Recipe, Stage, settings_of
from megatron_prolong.recipe.shape import MANIFEST, ModelShape, model_directory, read_manifest, read_shape
from megatron_prolong.recipe.source import Key


def check(recipe: Recipe, world_size: int | None = None, *, on_cpu: bool = False) -> list[str]:
    """Judge everything about a recipe that can be judged without torch: values, files, layouts.

    Args:
        world_size: number of ranks of the job; None skips what depends on it.
        on_cpu: the job will run without CUDA.

    Returns:
        The warnings.

    Raises:
        UserError: with every problem.
    """
    findings = find_problems(recipe, world_size, on_cpu=on_cpu)
    if findings.errors:
        raise problems_error(recipe.origin.file, findings.errors)
    return findings.warnings


def find_problems(
    recipe: Recipe, world_size: int | None = None, *, on_cpu: bool = False, doubtful: Collection[Key] = ()
) -> Findings:
    """Every problem of a recipe. Keys in `doubtful` hold stand-in values and are not judged."""
    findings = Findings(recipe, doubtful)
    for broken in broken_rules(recipe):
        findings.error(*broken)
    behind = stages_behind(recipe.model.path) if recipe.model.path else []
    shape = _model(findings, behind)
    _run_directory(findings)
    _optimizers(findings)
    _same_draws(findings, behind)
    doubtful_model = findings.has_doubtful_part(("model",))
    tokenizer = None if doubtful_model else tokenizer_fingerprint(tokenizer_of(recipe))
    rope_base = shape.rope_base if shape else None
    for stage in recipe.stages:
        _rope_base(findings, stage, rope_base)
        rope_base = stage.rope_base or rope_base
        _yarn(findings, stage)
        _mixture(findings, stage, tokenizer)
        _layout(findings, stage, shape, world_size)
        if on_cpu and settings_of(recipe, stage).precision == "fp8":
            key = ("stages", stage.name, "precision") if stage.precision else ("precision",)
            findings.error(key, "found fp8; it needs CUDA, and this machine has none: use bf16 or fp32")
    return findings


def needs_model(recipe: Recipe) -> bool:
    """Whether a stage has yet to start from the recipe's model; after that the run holds all it needs itself."""
    from_model = [recipe.stages[0], *(stage for stage in recipe.stages[1:] if not stage.carry.weights)]
    return not all(complete_checkpoints(recipe.run_dir / stage.name) for stage in from_model)


def incoming_shape(recipe: Recipe) -> ModelShape:
    """The shape of the model before the first stage: read from its weights, or as model.init describes.

    Raises:
        UserError: the model or the tokenizer cannot be read.
    """
    model = recipe.model
    if (start := _weights_of(recipe)) is not None:
        return read_shape(start)
    assert model.init is not None, "loading refuses a model with neither path nor init"
    assert model.tokenizer is not None, "loading refuses init without a tokenizer"
    return model.init.shape(vocabulary_size(model.tokenizer))


def _weights_of(recipe: Recipe) -> Path | None:
    """The weights that tell the shape: the run's own once it has any, as the model's may be gone by then."""
    if not needs_model(recipe):
        return _newest(recipe, recipe.stages[0])
    converted = recipe.run_dir / INITIAL
    return converted if (converted / MANIFEST).exists() else recipe.model.path


def tokenizer_of(recipe: Recipe) -> Path | None:
    """The directory of the tokenizer: the run's own copy, once there is one."""
    kept = recipe.run_dir / SIDECAR
    return kept if (kept / "tokenizer.json").exists() else recipe.model.tokenizer_path


def _model(findings: Findings, behind: Sequence[Stage]) -> ModelShape | None:
    """Judge model and tokenizer; the shape, where it can be known. `behind`: what the model went through."""
    model = findings.recipe.model
    before = len(findings.errors)
    if (start := _weights_of(findings.recipe)) is not None:
        problems = model_problems(start)
        for problem in problems:
            findings.error(("model", "path"), problem)
        if not problems and start == model.path and (warning := unfinished_stage(start, behind)):
            findings.warn(("model", "path"), warning)
    if model.tokenizer is not None and tokenizer_of(findings.recipe) == model.tokenizer:
        for problem in tokenizer_problems(model.tokenizer):
            findings.error(("model", "tokenizer"), problem)
    contradictory = any(model_rules(model)) or findings.has_doubtful_part(("model",))
    if len(findings.errors) > before or contradictory:
        return None
    shape = incoming_shape(findings.recipe)
    if shape.head_dim % 2:
        rule = f"its head size is {shape.head_dim}; rotary embeddings rotate pairs, so it must be even"
        findings.error(("model", "path" if model.path else "init"), rule)
    _vocabulary(findings, shape)
    return shape


def _vocabulary(findings: Findings, shape: ModelShape) -> None:
    path = tokenizer_of(findings.recipe)
    assert path is not None, "a model with a shape has a path or a tokenizer"
    try:
        size = vocabulary_size(path)
    except UserError as error:
        findings.warn(("model", "path"), f"{error}; set model.tokenizer to export and evaluate")
        return
    if size > shape.vocab_size:
        findings.error(
            ("model", "tokenizer"),
            f"{path} has {size} tokens, but the model has embeddings for {shape.vocab_size}; "
            "use the tokenizer that the model was trained with",
        )


def _run_directory(findings: Findings) -> None:
    run_dir = findings.recipe.run_dir
    existing = nearest_existing(run_dir)
    if not existing.is_dir():
        findings.error(("run_dir",), f"{existing} is a file; name a directory")
    elif not os.access(existing, os.W_OK):
        findings.error(("run_dir",), f"{existing} is not writable; name another directory")
    elif "$" in str(run_dir):
        findings.error(("run_dir",), f"{run_dir} names a variable that is not set")
    elif moved := _moved_to(findings.recipe):
        findings.error(("run_dir",), f"{run_dir} is gone; this run is in {moved} now: add run_dir={moved}")


def _moved_to(recipe: Recipe) -> Path | None:
    """Where the run is now, if this is a run's own recipe and the directory it names is gone."""
    file, place = Path(recipe.origin.file), recipe.origin.place(("run_dir",))
    if file.name != RESOLVED_RECIPE or place.source != str(file) or recipe.run_dir.exists():
        return None
    return file.parent if any(complete_checkpoints(file.parent / s.name) for s in recipe.stages) else None


def _rope_base(findings: Findings, stage: Stage, incoming: float | None) -> None:
    if stage.rope_base and incoming and stage.rope_base < incoming:
        found = f"found {stage.rope_base:g}, below the incoming {incoming:g}"
        findings.warn(("stages", stage.name, "rope_base"), f"{found}; a longer context needs a larger base")


def _yarn(findings: Findings, stage: Stage) -> None:
    if (yarn := stage.yarn) and (reach := int(yarn.factor * yarn.original_length)) < stage.sequence_length:
        found = f"found {yarn.factor:g}, which reaches to {reach} tokens"
        needed = f"{stage.sequence_length} need {stage.sequence_length / yarn.original_length:g}"
        findings.warn(("stages", stage.name, "yarn", "factor"), f"{found}; {needed}")


def _optimizers(findings: Findings) -> None:
    """Whether each stage can go on with the optimizer of its own checkpoint, or else with the one it takes over."""
    recipe = findings.recipe
    path = recipe.model.path and model_directory(recipe.model.path)
    saved, whose = _saved_optimizer(path), f"that of {path}"
    uses: list[Key] = [("layout",), ("precision",)]
    for stage in recipe.stages:
        key, newest = ("stages", stage.name), _newest(recipe, stage)
        if is_done(recipe, stage):
            saved, whose = _saved_optimizer(newest), f"that of {newest}"
            continue
        uses = [*uses, key]
        settings = settings_of(recipe, stage)
        own = OptimizerForm(settings.layout.distributed_optimizer, settings.precision)
        if newest is not None:
            if problem := carry_problem(_saved_optimizer(newest), own):
                findings.error(key, f"the optimizer of {newest} cannot be {problem}: undo that", uses)
        elif stage.carry.optimizer and (problem := carry_problem(saved, own)):
            rule = f"found true; {whose} cannot be {problem}: change that, or set false"
            findings.error((*key, "carry", "optimizer"), rule, uses)
        saved, whose = own, f"stage {stage.name}'s"


def _newest(recipe: Recipe, stage: Stage) -> Path | None:
    return next(reversed(history(recipe.run_dir / stage.name).values()), None)


def _saved_optimizer(checkpoint: Path | None) -> OptimizerForm | None:
    """That of a checkpoint; None where there is none, or its description is damaged, which loading it will say."""
    if checkpoint is None or not (checkpoint / MANIFEST).exists():
        return None
    try:
        return OptimizerForm.saved_in(read_manifest(checkpoint))
    except (UserError, KeyError, TypeError):
        return None


def _same_draws(findings: Findings, behind: Sequence[Stage]) -> None:
    """Warn of stages that draw again, in the same order, the samples that their weights were trained on."""
    recipe = findings.recipe
    before = {_draws(stage): f"stage {stage.name} of {recipe.model.path}" for stage in behind}
    seen = dict(before)
    for stage in recipe.stages:
        if not stage.carry.weights:
            seen = dict(before)
        here = f"stage {stage.name}"
        first = seen.setdefault(_draws(stage), here)
        begun = _newest(recipe, stage) is not None  # its seed cannot change any more
        if first != here and stage.mixture != "mock" and not begun:
            found = f"found {stage.seed}, as in {first}, whose samples it draws again in the same order"
            findings.warn(("stages", stage.name, "seed"), f"{found}; set another seed")


def _draws(stage: Stage) -> tuple[object, ...]:
    """Equal for stages that draw the same samples."""
    mixture = stage.mixture if stage.mixture == "mock" else tuple(path.resolve() for path in stage.mixture)
    return stage.sequence_length, stage.seed, mixture


def _mixture(findings: Findings, stage: Stage, tokenizer: str | None) -> None:
    key = ("stages", stage.name, "mixture")
    if stage.mixture == "mock" or is_done(findings.recipe, stage):
        return  # its data may have been deleted to make room
    for path in stage.mixture:
        for problem in mixture_problems(path, loss_mask=stage.loss_mask, tokenizer=tokenizer):
            findings.error((*key, str(path)), problem)


def is_done(recipe: Recipe, stage: Stage) -> bool:
    """Whether the last checkpoint of the stage is there, and `latest` was not put back before it."""
    return stage.has_budget and stage.num_steps in history(recipe.run_dir / stage.name)


def _layout(findings: Findings, stage: Stage, shape: ModelShape | None, world_size: int | None) -> None:
    own = stage.layout.model_dump(exclude_none=True)
    key = ("stages", stage.name)
    layout, precision, *_ = settings_of(findings.recipe, stage)
    for problem in layout_problems(layout, shape, world_size, precision):
        if problem.field == "world_size":
            findings.error((*key, "layout"), problem.rule, uses=[("layout",)])
            continue
        where = (*key, "layout", problem.field) if problem.field in own else ("layout", problem.field)
        findings.error(where, f"found {getattr(layout, problem.field)}; {problem.rule}")
    if precision == "fp8" and (found := fp8_layout_problem(findings.recipe.fp8_recipe, layout.cp)):
        findings.error(
            (*key, "precision") if stage.precision else ("precision",), found, uses=[("fp8_recipe",)]
        )
    if world_size and (dp := world_size // layout.model_ranks) > stage.batch_sequences:
        shared = f"{dp} data-parallel ranks share a batch of {stage.batch_sequences} sequences"
        findings.warn((*key, "batch_tokens"), f"{shared}: with few documents, some have nothing to do")
