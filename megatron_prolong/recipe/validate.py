"""What is wrong with a recipe that its types alone cannot show: everything at once, before torch is imported."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.recipe.source import Key


@dataclass
class Findings:
    """Problems that stop a run, and things worth saying that do not."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_problems(recipe: Recipe, world_size: int | None = None, doubtful: Collection[Key] = ()) -> Findings:
    """Every problem of a recipe."""
    return Findings()


def check(recipe: Recipe, world_size: int | None = None) -> None:
    """Raises UserError with every problem."""
    from megatron_prolong.recipe.load import problems_error

    if errors := find_problems(recipe, world_size).errors:
        raise problems_error(recipe.origin.file, errors)
