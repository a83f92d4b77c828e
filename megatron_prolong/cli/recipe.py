"""`prolong recipe`: show, check and describe recipes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.recipe.findings import Findings
    from megatron_prolong.recipe.schema import EvaluationSpec

app = typer.Typer(help="Show, check and describe recipes.", no_args_is_help=True, rich_markup_mode=None)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="E.g. stage.64k.lr=2e-5 layout.tp=2.")
]


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the resolved recipe: bases merged, overrides applied, every default written out."""
    from megatron_prolong.recipe.load import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or ())), end="")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks of the job.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="The job runs without CUDA.")] = False,
) -> None:
    """List everything wrong with a recipe: keys, values, layouts, missing files. Exit code 2."""
    from megatron_prolong.recipe.findings import problems_error
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.recipe.validate import find_problems

    loaded = load_recipe(recipe, overrides or ())
    findings = find_problems(loaded, world_size, on_cpu=cpu)
    if loaded.evaluation:
        _judge_evaluation(loaded.evaluation, findings)
    warn(findings.warnings)
    if findings.errors:
        raise problems_error(str(recipe), findings.errors)
    for stage in loaded.stages:
        print(
            f"{stage.name}: {stage.num_steps} steps of {stage.batch_sequences} × {stage.sequence_length} "
            f"tokens ({stage.num_tokens:,} in all), lr {stage.lr:g} → {stage.min_lr:g}"
        )
    print(f"{recipe}: nothing wrong")


def _judge_evaluation(spec: EvaluationSpec, findings: Findings) -> None:
    """Its tasks and their data, which the recipe's own rules know nothing of."""
    from megatron_prolong.evaluation.documents import check_documents
    from megatron_prolong.evaluation.suite import tasks_of
    from megatron_prolong.evaluation.suites import left_out

    try:
        tasks_of(spec)
        check_documents(spec.held_out, [])
        findings.warnings += left_out(spec.suite, spec.lengths, spec.tasks)
    except UserError as error:
        findings.error(("evaluation",), str(error))


def warn(warnings: Iterable[str]) -> None:
    """Print warnings, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from megatron_prolong.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
