"""From a YAML file to a Recipe, or to one error that lists everything wrong with it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_prolong.recipe.findings import problems_error
from megatron_prolong.recipe.rules import broken_rules
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.recipe.source import Key, Source, key_text, read_source, stage_label
from megatron_prolong.recipe.validate import find_problems

_RULES = {
    "missing": "required, but not given",
    "string_pattern_mismatch": "may hold only letters, digits, - and _",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text (put it in quotes)",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
}


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with its bases merged in and `key.path=value` overrides applied.

    Only what the text itself can show is judged here: no model or data is touched, so `show` works anywhere.

    Raises:
        UserError: the file is missing or not YAML; or unknown keys, wrong types, impossible and contradictory
            values, all of them at once, together with what `check` finds in the parts that could be read.
    """
    source = read_source(path, overrides)
    recipe, problems, doubtful = parse(source)
    if recipe is not None and (problems or any(broken_rules(recipe))):
        problems += find_problems(recipe, doubtful=doubtful).errors
    if problems:
        raise problems_error(source.origin.file, problems)
    assert recipe is not None, "no problem, so there is a recipe"
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe: every default written out, no base; loading it gives the same recipe."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    for stage in data["stages"]:
        if not stage["layout"]:
            del stage["layout"]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def parse(source: Source) -> tuple[Recipe | None, list[str], set[Key]]:
    """The recipe, the problems, and the keys whose value is a stand-in for one that was wrong.

    Values that do not fit are replaced by their default (or an example) so that the rest can still be judged;
    the recipe is None where even that is impossible.
    """
    data = source.data
    problems = list(source.problems)
    doubtful: set[Key] = set()
    for _ in range(8):  # a replacement can uncover a further error, never endlessly
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
            if data is source.data:
                problems += [_describe(detail, source) for detail in details]
            doubtful |= {
                _named(one["loc"], source.data) for one in details if one["type"] != "extra_forbidden"
            }
            data = _repaired(data, details)
            continue
        recipe._origin = source.origin
        return recipe, problems, doubtful
    return None, problems, doubtful


def _describe(detail: ErrorDetails, source: Source) -> str:
    """`file:line: key: found value; rule` for one of pydantic's errors."""
    key = _named(detail["loc"], source.data)
    place = source.origin.place(key)
    if detail["type"] == "missing":
        return f"{place}: {key_text(key)}: {_RULES['missing']}"
    if detail["type"] == "extra_forbidden":
        return f"{place}: {key_text(key)}: unknown key; {_hint(key, detail['loc'])}"
    rule = _RULES.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    rule = rule.replace("Input should be", "must be")
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        rule = "must be a mapping (key: value)"
    if detail["type"] == "literal_error" and key[-1] == "mixture":
        rule = "must be directories with their proportions, {DIRECTORY: 1}, or the word mock"
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        options = _known_options(detail)
        if near := get_close_matches(detail["input"], options, n=1):
            rule += f"; did you mean {near[0]}?"
    return f"{place}: {key_text(key)}: found {detail['input']!r}; {rule}"


def _hint(key: Key, location: tuple[int | str, ...]) -> str:
    """What an unknown key may have been meant to be."""
    if len(key) == 1 and key[0] in Stage.model_fields:
        return f"every stage has its own: stage.NAME.{key[0]}=VALUE, or in the file under stages"
    known = sorted(_known_keys(location[:-1]))
    if near := get_close_matches(key[-1], known, n=1):
        return f"did you mean {key_text((*key[:-1], near[0]))}?"
    return f"known keys: {', '.join(known)}"


def _known_options(detail: ErrorDetails) -> list[str]:
    return [
        option for option in str(detail.get("ctx", {}).get("expected", "")).split("'") if option.strip(" ,or")
    ]


def _named(location: tuple[int | str, ...], data: dict[str, Any]) -> Key:
    """pydantic's location with stages by name and without the tags of alternatives."""
    key: list[str] = []
    for position, part in enumerate(location):
        if position == 1 and location[0] == "stages" and isinstance(part, int):
            stage = data["stages"][part]
            key.append(stage_label(stage.get("name") if isinstance(stage, dict) else None, part))
        elif not (location[position - 1] == "mixture" and part in ("directories", "word") and position == 3):
            key.append(str(part))
    return tuple(part for part in key if part != "[key]")


def _known_keys(location: tuple[int | str, ...]) -> set[str]:
    """Keys allowed in the mapping at `location`."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            inner = next(_models_in(model.model_fields[part].annotation), None)
            assert inner is not None, f"{part} holds no mapping"
            model = inner
    keys = set(model.model_fields)
    return keys | {"base"} if model is Recipe else keys


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def _repaired(data: dict[str, Any], details: Sequence[ErrorDetails]) -> dict[str, Any]:
    """A copy of `data` without the values that do not fit; required ones get the example of their field."""
    repaired = deepcopy(data)
    for detail in details:
        location = [part for part in detail["loc"] if part not in ("directories", "word", "[key]")]
        model: type[BaseModel] = Recipe
        target: Any = repaired
        for depth, part in enumerate(location):
            field = model.model_fields.get(part) if isinstance(part, str) else None
            inner = next(_models_in(field.annotation), None) if field else None
            last = depth == len(location) - 1
            if last or not isinstance(target[part], dict | list):
                example = field.examples[0] if field and field.examples else None
                _replace(target, part, str(location[1]) if model is Stage and part == "name" else example)
                break
            model, target = inner or model, target[part]
    return repaired


def _replace(target: Any, part: int | str, example: Any) -> None:
    if isinstance(part, int):
        target[part] = {}
    elif example is not None:
        target[part] = example
    else:
        target.pop(part, None)
