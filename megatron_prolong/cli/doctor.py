"""`prolong doctor`: what this machine has, and what a recipe lacks on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.cli.recipe import Overrides
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.recipe.schema import Recipe
    from megatron_prolong.recipe.shape import ModelShape
    from megatron_prolong.runtime.doctor import Finding


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also say what this recipe lacks.")
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the job; those visible here by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without timing an all-reduce.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at packages, GPUs, NCCL, fabric and disk; exit code 1 when something needed is missing."""
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.recipe.run_files import nearest_existing

    loaded = load_recipe(recipe, overrides or ()) if recipe is not None else None  # before torch is imported
    from megatron_prolong.runtime.doctor import examine
    from megatron_prolong.runtime.strict_json import dumps

    findings = examine(nearest_existing(loaded.run_dir) if loaded else Path.cwd(), quick=quick)
    if loaded is not None:
        findings += recipe_findings(loaded, gpus)
    if json_output:
        print(dumps(findings, indent=1))
    else:
        for finding in findings:
            remedy = f"\n{'':10}{finding.remedy}" if finding.remedy else ""
            print(f"{finding.status:9} {finding.name}: {finding.detail}{remedy}")
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def recipe_findings(recipe: Recipe, world_size: int | None) -> list[Finding]:
    """What `recipe` lacks on this machine: inputs, precision, GPU memory, disk."""
    import torch

    from megatron_prolong.recipe.validate import find_problems, incoming_shape
    from megatron_prolong.runtime.doctor import Finding

    visible = torch.cuda.device_count() if torch.cuda.is_available() else None
    world = world_size or visible
    problems = find_problems(recipe, world, on_cpu=visible is None)
    findings = [Finding("recipe", "missing", problem) for problem in problems.errors]
    findings += [Finding("recipe", "warning", warning) for warning in problems.warnings]
    if not problems.errors:
        detail = f"{recipe.name}: nothing wrong for {world or 'any number of'} ranks"
        findings.append(Finding("recipe", "ok", detail))
    findings += _precision_findings(recipe)
    try:
        shape = incoming_shape(recipe)
    except (UserError, AssertionError):
        return findings  # the model is among the problems already
    findings += _memory_findings(recipe, shape, world)
    return [*findings, _checkpoint_finding(recipe, shape)]


def _precision_findings(recipe: Recipe) -> list[Finding]:
    import torch

    from megatron_prolong.recipe.fp8 import fp8_problem
    from megatron_prolong.recipe.schema import settings_of
    from megatron_prolong.runtime.doctor import Finding, version_of

    every = {stage.name: settings_of(recipe, stage) for stage in recipe.stages}
    stages = {name: settings for name, settings in every.items() if settings.precision == "fp8"}
    if not stages or not torch.cuda.is_available():
        return []  # fp8 on CPU is among the recipe's problems already
    name = f"fp8 (stage {', '.join(stages)})"
    if version_of("transformer-engine") is None:
        remedy = "use NVIDIA's PyTorch image (see Dockerfile)"
        return [Finding(name, "missing", "needs Transformer Engine", remedy)]
    capability = torch.cuda.get_device_capability()
    problems = (fp8_problem(recipe.fp8_recipe, capability, one.layout.cp) for one in stages.values())
    if problem := next(filter(None, problems), None):
        return [Finding(name, "missing", problem)]
    return [Finding(name, "ok", "Transformer Engine and a GPU with fp8")]


def _memory_findings(recipe: Recipe, shape: ModelShape, world: int | None) -> list[Finding]:
    """Whether each stage fits the GPUs here; without any, what it would take there."""
    import torch

    from megatron_prolong.page.amount import amount
    from megatron_prolong.plan.hardware import load_hardware
    from megatron_prolong.plan.job import job_of
    from megatron_prolong.plan.memory import peak_memory
    from megatron_prolong.recipe.layout_rules import layout_problems
    from megatron_prolong.recipe.schema import settings_of
    from megatron_prolong.runtime.doctor import Finding, version_of

    with_te = version_of("transformer-engine") is not None
    any_gpu = next(iter(load_hardware().values()))  # what is kept free is the same on all
    findings = []
    for stage in recipe.stages:
        layout = settings_of(recipe, stage).layout
        if layout_problems(layout, shape, None):
            continue  # they are among the recipe's problems already
        ranks = layout.model_ranks
        job = job_of(recipe, stage, shape, max(world or ranks, ranks), transformer_engine=with_te)
        memory = peak_memory(job)
        name, detail = f"memory of stage {stage.name}", f"{amount(memory.total / 1e9)} GB per rank predicted"
        if not torch.cuda.is_available():
            findings.append(Finding(name, "ok", f"{detail} on GPUs"))
            continue
        has = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        detail += f", GPUs have {has / 1e9:.0f}"
        if any_gpu.needed_bytes(memory) <= has:
            findings.append(Finding(name, "ok", detail))
        else:
            findings.append(Finding(name, "missing", detail, "see prolong plan for layouts that fit"))
    return findings


def _checkpoint_finding(recipe: Recipe, shape: ModelShape) -> Finding:
    from megatron_prolong.plan.disk import REMEDY, checkpoint_room
    from megatron_prolong.runtime.doctor import Finding

    room = checkpoint_room(recipe, shape)
    return Finding("checkpoints", *(("ok", str(room)) if room.fits else ("missing", str(room), REMEDY)))
