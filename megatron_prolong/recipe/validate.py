"""What is wrong with a recipe that types alone cannot show: everything at once, before torch is imported."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.fp8 import fp8_parameters_problem
from megatron_prolong.recipe.inputs import (
    mixture_problems,
    model_problems,
    tokenizer_fingerprint,
    tokenizer_problems,
    unfinished_stage,
    vocabulary_size,
)
from megatron_prolong.recipe.layout_rules import OptimizerForm, carry_problem, layout_problems
from megatron_prolong.recipe.run_files import (
    INITIAL,
    RESERVED_STAGE_NAMES,
    RESOLVED_RECIPE,
    SIDECAR,
    complete_checkpoints,
)
from megatron_prolong.recipe.schema import InitSpec, Recipe, Stage, layout_of, precision_of
from megatron_prolong.recipe.shape import MANIFEST, ModelShape, read_shape
from megatron_prolong.recipe.source import Key, key_text


@dataclass
class Findings:
    """What `find_problems` found: errors stop a run, warnings are worth reading before it starts."""

    recipe: Recipe
    doubtful: Collection[Key] = ()
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, key: Key, message: str, *, uses: Collection[Key] = ()) -> None:
        """Note a problem of `key`, unless a value it was derived from is a stand-in for a wrong one."""
        self._note(self.errors, key, message, uses)

    def warn(self, key: Key, message: str) -> None:
        """The same, for something that does not stop the run."""
        self._note(self.warnings, key, message, ())

    def _note(self, notes: list[str], key: Key, message: str, uses: Collection[Key]) -> None:
        if any(self.is_doubtful(used) for used in (key, *uses)):
            return
        line = f"{self.recipe.origin.place(key)}: {key_text(key)}: {message}"
        if line not in notes:
            notes.append(line)

    def is_doubtful(self, key: Key) -> bool:
        """True when `key`, or something around it, could not be read."""
        return any(key[:end] in self.doubtful for end in range(1, len(key) + 1))

    def has_doubtful_part(self, key: Key) -> bool:
        """True when `key`, or something around or within it, could not be read."""
        return self.is_doubtful(key) or any(part[: len(key)] == key for part in self.doubtful)


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


def problems_error(file: str, problems: Collection[str]) -> UserError:
    """The error that lists every problem of a recipe file."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return UserError.many(f"{file}: the recipe has {count}:", problems)


def find_problems(
    recipe: Recipe, world_size: int | None = None, *, on_cpu: bool = False, doubtful: Collection[Key] = ()
) -> Findings:
    """Every problem of a recipe. Keys in `doubtful` hold stand-in values and are not judged."""
    findings = Findings(recipe, doubtful)
    shape = _model(findings)
    _run_directory(findings)
    _checkpoint(findings)
    _chain(findings, shape)
    _same_draws(findings)
    _fp8_parameters(findings)
    doubtful_model = findings.has_doubtful_part(("model",))
    tokenizer = None if doubtful_model else tokenizer_fingerprint(tokenizer_of(recipe))
    for stage in recipe.stages:
        _stage(findings, stage)
        _mixture(findings, stage, tokenizer)
        _layout(findings, stage, shape, world_size)
        if on_cpu and precision_of(recipe, stage) == "fp8":
            key = ("stages", stage.name, "precision") if stage.precision else ("precision",)
            findings.error(key, "found fp8; it needs CUDA, and this machine has none: use bf16 or fp32")
    return findings


def needs_model(recipe: Recipe) -> bool:
    """Whether a stage is yet to start from the recipe's model. Once none is, the run has all it needs itself."""
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
    assert model.init is not None, "check() refuses a model with neither path nor init"
    assert model.tokenizer is not None, "check() refuses init without a tokenizer"
    return model.init.shape(vocabulary_size(model.tokenizer))


def _weights_of(recipe: Recipe) -> Path | None:
    """What the run has trained, converted or made, once there is that: the model's own may be gone by then."""
    if not needs_model(recipe):
        return list(complete_checkpoints(recipe.run_dir / recipe.stages[0].name).values())[-1]
    converted = recipe.run_dir / INITIAL
    return converted if (converted / MANIFEST).exists() else recipe.model.path


def tokenizer_of(recipe: Recipe) -> Path | None:
    """The directory of the tokenizer: the run's own copy, once there is one."""
    kept = recipe.run_dir / SIDECAR
    return kept if (kept / "tokenizer.json").exists() else recipe.model.tokenizer_path


def _model(findings: Findings) -> ModelShape | None:
    """Judge model and tokenizer; the shape, where it can be known."""
    model = findings.recipe.model
    before = len(findings.errors)
    if (model.path is None) == (model.init is None):
        found = "neither" if model.path is None else "both"
        findings.error(("model",), f"found {found} of path and init; give one")
    if (start := _weights_of(findings.recipe)) is not None:
        problems = model_problems(start)
        for problem in problems:
            findings.error(("model", "path"), problem)
        if not problems and start == model.path and (warning := unfinished_stage(start)):
            findings.warn(("model", "path"), warning)
    if model.init is not None:
        _init(findings, model.init)
        if model.tokenizer is None:
            findings.error(("model", "tokenizer"), "required with init: it sets the vocabulary size")
    if model.tokenizer is not None and tokenizer_of(findings.recipe) == model.tokenizer:
        for problem in tokenizer_problems(model.tokenizer):
            findings.error(("model", "tokenizer"), problem)
    if len(findings.errors) > before or findings.has_doubtful_part(("model",)):
        return None
    shape = incoming_shape(findings.recipe)
    if shape.head_dim % 2:
        rule = f"its head size is {shape.head_dim}; rotary embeddings rotate pairs, so it must be even"
        findings.error(("model", "path" if model.path else "init"), rule)
    _vocabulary(findings, shape)
    return shape


def _init(findings: Findings, init: InitSpec) -> None:
    if init.hidden_size % init.num_heads:
        rule = f"found {init.num_heads}; must divide hidden_size, {init.hidden_size}"
        findings.error(("model", "init", "num_heads"), rule, uses=[("model", "init", "hidden_size")])
    if init.num_heads % init.num_kv_heads:
        rule = f"found {init.num_kv_heads}; must divide num_heads, {init.num_heads}"
        findings.error(("model", "init", "num_kv_heads"), rule, uses=[("model", "init", "num_heads")])


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
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        findings.error(("run_dir",), f"{existing} is a file; name a directory")
    elif not os.access(existing, os.W_OK):
        findings.error(("run_dir",), f"{existing} is not writable; name another directory")
    elif "$" in str(run_dir):
        findings.error(("run_dir",), f"{run_dir} names a variable that is not set")
    elif moved := _moved_to(findings.recipe):
        findings.error(("run_dir",), f"{run_dir} is gone; this run is in {moved} now: add run_dir={moved}")


def _moved_to(recipe: Recipe) -> Path | None:
    """Where the run lies whose own recipe this is, when that still names a directory that is not there any more."""
    file, place = Path(recipe.origin.file), recipe.origin.place(("run_dir",))
    if file.name != RESOLVED_RECIPE or place.source != str(file) or recipe.run_dir.exists():
        return None
    return file.parent if any(complete_checkpoints(file.parent / s.name) for s in recipe.stages) else None


def _checkpoint(findings: Findings) -> None:
    spec = findings.recipe.checkpoint
    if spec.keep_every is not None and spec.keep_every % spec.every:
        key = ("checkpoint", "keep_every")
        message = f"found {spec.keep_every}; must be a multiple of checkpoint.every, {spec.every}"
        findings.error(key, message, uses=[("checkpoint", "every")])


def _chain(findings: Findings, shape: ModelShape | None) -> None:
    """What concerns one stage after another: names, carry-over, RoPE bases."""
    recipe = findings.recipe
    for name, count in Counter(stage.name for stage in recipe.stages).items():
        if count > 1:
            findings.error(("stages", name), f"{count} stages have this name; names must be unique")
        if name in RESERVED_STAGE_NAMES:
            reserved = ", ".join(RESERVED_STAGE_NAMES)
            findings.error(("stages", name, "name"), f"found {name}; {reserved} are reserved: rename it")
    rope_base = shape.rope_base if shape else None
    for index, stage in enumerate(recipe.stages):
        key = ("stages", stage.name)
        if not stage.carry.weights:
            if index == 0 and recipe.model.path is not None:
                rule = (
                    "found false; the first stage starts from model.path: use model.init for random weights"
                )
                findings.error((*key, "carry", "weights"), rule)
            elif stage.carry.optimizer:
                rule = "found true; moments of other weights are of no use: carry both or neither"
                findings.error((*key, "carry", "optimizer"), rule)
        elif stage.carry.optimizer and index:
            _carried_optimizer(findings, recipe.stages[index - 1], stage)
        if stage.rope_base and rope_base and stage.rope_base < rope_base:
            found = f"found {stage.rope_base:g}, below the incoming {rope_base:g}"
            findings.warn((*key, "rope_base"), f"{found}; a longer context needs a larger base")
        rope_base = stage.rope_base or rope_base


def _carried_optimizer(findings: Findings, before: Stage, stage: Stage) -> None:
    recipe, key = findings.recipe, ("stages", stage.name)
    if any(map(findings.has_doubtful_part, (("layout",), ("precision",), ("stages", before.name), key))):
        return
    saved, own = (
        OptimizerForm(layout_of(recipe, one).distributed_optimizer, precision_of(recipe, one))
        for one in (before, stage)
    )
    if problem := carry_problem(saved, own):
        rule = f"found true; stage {before.name}'s cannot be {problem}: change that, or set false"
        findings.error((*key, "carry", "optimizer"), rule)


def _same_draws(findings: Findings) -> None:
    """Stages that see again, in the same order, what the weights they carry on were trained on."""
    seen: dict[object, str] = {}
    for stage in findings.recipe.stages:
        if not stage.carry.weights:
            seen.clear()
        first = seen.setdefault((stage.sequence_length, stage.seed, tuple(stage.mixture)), stage.name)
        begun = complete_checkpoints(findings.recipe.run_dir / stage.name)  # its seed is fixed then
        if first != stage.name and stage.mixture != "mock" and not begun:
            found = f"found {stage.seed}, as in stage {first}, whose samples it draws again in the same order"
            findings.warn(("stages", stage.name, "seed"), f"{found}; set another seed")


def _stage(findings: Findings, stage: Stage) -> None:
    key = ("stages", stage.name)
    if (stage.steps is None) == (stage.tokens is None):
        found = "neither" if stage.steps is None else "both"
        findings.error(
            key, f"found {found} of steps and tokens; give one", uses=[(*key, "steps"), (*key, "tokens")]
        )
    if stage.batch_tokens % stage.sequence_length:
        findings.error(
            (*key, "batch_tokens"),
            f"found {stage.batch_tokens}; must be a multiple of sequence_length, {stage.sequence_length}",
            uses=[(*key, "sequence_length")],
        )
    if stage.micro_batch_length < stage.sequence_length:
        findings.error(
            (*key, "micro_batch_tokens"),
            f"found {stage.micro_batch_tokens}; must hold at least one sequence of {stage.sequence_length}",
            uses=[(*key, "sequence_length")],
        )


def _mixture(findings: Findings, stage: Stage, tokenizer: str | None) -> None:
    key = ("stages", stage.name, "mixture")
    if findings.has_doubtful_part(key):
        return
    if stage.mixture == "mock":
        if stage.loss_mask:
            rule = "found true; mock data has no mask column"
            findings.error(("stages", stage.name, "loss_mask"), rule)
        return
    if not stage.mixture:
        findings.error(key, "found no directory; name at least one, or write the word mock")
        return
    total = math.fsum(stage.mixture.values())
    if abs(total - 1) > 1e-6:
        findings.error(key, f"the proportions sum to {total:.6g}; they must sum to 1")
    if _is_done(findings.recipe, stage):
        return  # its data may have been deleted to make room
    for path in stage.mixture:
        for problem in mixture_problems(path, loss_mask=stage.loss_mask, tokenizer=tokenizer):
            findings.error((*key, str(path)), problem)


def _is_done(recipe: Recipe, stage: Stage) -> bool:
    """Whether the last checkpoint of the stage is there."""
    one_budget = (stage.steps is None) != (stage.tokens is None)
    return one_budget and stage.num_steps in complete_checkpoints(recipe.run_dir / stage.name)


def _fp8_parameters(findings: Findings) -> None:
    recipe = findings.recipe
    if not recipe.fp8_parameters:
        return
    stages = [stage for stage in recipe.stages if precision_of(recipe, stage) == "fp8"]
    if not stages:
        findings.error(("fp8_parameters",), "found true; needs precision: fp8", uses=[("precision",)])
    for stage in stages:
        sharded = layout_of(recipe, stage).distributed_optimizer
        if problem := fp8_parameters_problem(recipe.fp8_recipe, distributed_optimizer=sharded):
            findings.error(("fp8_parameters",), f"found true; {problem}")


def _layout(findings: Findings, stage: Stage, shape: ModelShape | None, world_size: int | None) -> None:
    recipe = findings.recipe
    own = stage.layout.model_dump(exclude_none=True)
    key = ("stages", stage.name)
    layout = layout_of(recipe, stage)
    for problem in layout_problems(layout, shape, world_size, precision_of(recipe, stage)):
        if problem.field == "world_size":
            findings.error((*key, "layout"), problem.rule, uses=[("layout",)])
            continue
        where = (*key, "layout", problem.field) if problem.field in own else ("layout", problem.field)
        findings.error(where, f"found {getattr(layout, problem.field)}; {problem.rule}")
    if world_size and (dp := world_size // layout.model_ranks) > stage.batch_sequences:
        shared = f"{dp} data-parallel ranks share a batch of {stage.batch_sequences} sequences"
        findings.warn((*key, "batch_tokens"), f"{shared}: with few documents, some have nothing to do")
