"""The batch script of a recipe: rendered to be read, changed and kept, for Slurm or for one machine without it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.runtime.publish import whole_file


def render_script(
    recipe: Recipe,
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    nodes: int,
    gpus_per_node: int,
    file: str = "script.sh",
) -> str:
    """The batch script that trains `recipe`.

    Args:
        recipe_path: where the script finds the recipe, from the directory it is started in.
        overrides: `key.path=value` changes that the script applies before those in its OVERRIDES.
        file: the script's own name, for the usage lines at its top.
    """
    values = {
        "RECIPE": shlex.quote(str(recipe_path)),
        "STAGES": ", ".join(stage.name for stage in recipe.stages),
        "STAGE": recipe.stages[0].name,
        "NAME": recipe.name,
        "NODES": str(nodes),
        "GPUS": str(gpus_per_node),
        "OVERRIDES": f'\nOVERRIDES=({shlex.join(overrides)} "${{OVERRIDES[@]}}")' if overrides else "",
        "FILE": shlex.quote(file),
    }
    script = resources.files(__package__).joinpath("batch_script.txt").read_text(encoding="utf-8")
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    return script


def write_script(script: str, path: Path) -> None:
    """Write an executable script; nothing half-written is left under its name."""
    with whole_file(path) as temporary:
        temporary.write_text(script, encoding="utf-8")
        temporary.chmod(0o755)


def submit_script(script: str) -> str:
    """Hand the script to sbatch; returns the job's number.

    Raises:
        UserError: there is no sbatch here, or it refuses the job.
    """
    try:
        result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            "no sbatch on this machine; write the script with --output and submit it there"
        ) from error
    if result.returncode:
        raise UserError(f"sbatch refused the job: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]
