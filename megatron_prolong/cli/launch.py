"""`prolong launch`: the batch script of a recipe, to read, keep or submit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_prolong.cli.recipe import Overrides, RecipePath, warn
from megatron_prolong.cli.train import check_start


def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=16, help="GPUs of each node.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Write the script here.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch.")] = False,
) -> None:
    """Render the Slurm script of a recipe: printed, written to a file, or submitted.

    The script is self-contained and readable; it also runs with plain bash on one machine without Slurm. With
    --submit, anything that would make the job fail is reported here and nothing is submitted.
    """
    from megatron_prolong.plan.launch import render_script, submit_script, write_script
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.recipe.validate import find_problems

    loaded = load_recipe(recipe, overrides or ())
    if submit:
        for change in check_start(loaded, nodes * gpus_per_node):
            print(change, file=sys.stderr)
    else:
        findings = find_problems(loaded, nodes * gpus_per_node)
        warn([*findings.errors, *findings.warnings])
    script = render_script(
        loaded,
        recipe,
        overrides or (),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        file=str(output or "script.sh"),
    )
    if output is not None:
        write_script(script, output)
        print(f"wrote {output}", file=sys.stderr)
    if submit:
        print(submit_script(script))
    elif output is None:
        print(script, end="")
