"""A recipe's YAML as plain data that remembers the file and line of every value.

`base:` inheritance and command-line overrides happen here, before any type is checked. Merging is deep, with
three exceptions that follow from meaning: stages merge by name, a mixture is replaced whole (proportions of
two mixtures do not add up), and one of two alternatives (`steps`/`tokens`, `path`/`init`) drops the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.origin import Origin, Place
from megatron_prolong.recipe.paths import expanded
from megatron_prolong.recipe.schema import NAME_PATTERN

Key = tuple[str, ...]
"""Path of a value, with stages by name: ("stages", "64k", "lr")."""

_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_ALTERNATIVES = {"steps": "tokens", "tokens": "steps", "path": "init", "init": "path"}


class _Loader(yaml.SafeLoader):
    """YAML whose numbers mean what they look like: what YAML 1.1 alone reads as octal (010 is 8), binary or
    base sixty (1:30 is 90) stays text, which is refused where a number is wanted."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if tag in _NUMBER_TAGS and re.match(r"[-+]?0[\d_b]|.*:", value):
            return self.DEFAULT_SCALAR_TAG
        return tag


@dataclass
class Source:
    """What a file says, where it says it, and what is wrong with the way it says it."""

    data: dict[str, Any]
    origin: Origin
    problems: list[str] = field(default_factory=list)


def read_source(path: Path | str, overrides: Sequence[str] = ()) -> Source:
    """A recipe file with its bases merged below it and the overrides applied on top.

    Raises:
        UserError: a file is missing or is not YAML, or the bases go in a circle.
    """
    source = _read_with_bases(Path(path), ())
    for override in overrides:
        try:
            _apply_override(source, override)
        except ValueError as error:
            source.problems.append(f"override {override!r}: {error}")
    return source


def stage_label(name: object, index: int) -> str:
    """What stands for a stage in a key: its name, or its place in the list where it has no usable name."""
    return name if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) else str(index)


def key_text(key: Key) -> str:
    """`stages.64k.lr`"""
    return ".".join(key)


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> Source:
    if path.resolve() in seen:
        circle = " → ".join(str(one) for one in (*seen, path.resolve()))
        raise UserError(f"{path}: `base:` goes in a circle ({circle}); remove one of them")
    source = _read_file(path)
    base = source.data.pop("base", None)
    if base is None:
        return source
    place = source.origin.place(("base",))
    if not isinstance(base, str):
        raise UserError(f"{place}: base: found {base!r}; must be the path of another recipe")
    base_path = path.parent / expanded(Path(base))
    if not base_path.is_file():
        raise UserError(
            f"{place}: base: {base_path}: no such file (the path is relative to the file that names it)"
        )
    below = _read_with_bases(base_path, (*seen, path.resolve()))
    return Source(
        data=_merge(below.data, source.data),
        origin=Origin(file=str(path), places={**below.origin.places, **source.origin.places}),
        problems=below.problems + source.problems,
    )


def _read_file(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read the recipe: not UTF-8 text ({error.reason})") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        source = Source(data={}, origin=Origin(file=str(path)))
        data = _construct(loader, node, (), source) if node is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{path}: not a recipe: nested too deeply, or an anchor holds itself") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        raise UserError(f"{path}: a recipe is a mapping (name:, model:, stages: …); found {found}")
    source.data = data
    return source


def _construct(loader: yaml.SafeLoader, node: yaml.Node, key: Key, source: Source) -> Any:
    """The node's value; notes its line under `key` and reports keys that are written twice."""
    source.origin.places[key] = Place(source.origin.file, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        written: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # such as {{ a template's }} braces
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key_node.value in written:
                place = Place(source.origin.file, key_node.start_mark.line + 1)
                source.problems.append(
                    f"{place}: {key_text((*key, key_node.value))}: written twice; keep one"
                )
            written.add(key_node.value)
        loader.flatten_mapping(node)  # puts what `<<: *anchor` brings before the mapping's own keys
        for key_node, value_node in node.value:
            name = str(loader.construct_object(key_node, deep=True))
            result[name] = _construct(loader, value_node, (*key, name), source)
            source.origin.places[(*key, name)] = Place(source.origin.file, key_node.start_mark.line + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, item, (*key, _item_name(loader, item, index)), source)
            for index, item in enumerate(node.value)
        ]
    return loader.construct_object(node, deep=True)


def _item_name(loader: yaml.SafeLoader, item: yaml.Node, index: int) -> str:
    """A stage goes by its name, anything else in a list by its index."""
    if isinstance(item, yaml.MappingNode):
        for key_node, value_node in item.value:
            if key_node.value == "name" and isinstance(value_node, yaml.ScalarNode):
                return stage_label(loader.construct_object(value_node), index)
    return str(index)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`; neither is changed."""
    dropped = {_ALTERNATIVES[name] for name in above if name in _ALTERNATIVES} - above.keys()
    merged = {name: value for name, value in below.items() if name not in dropped}
    for name, value in above.items():
        old = merged.get(name)
        if name == "stages" and isinstance(old, list) and isinstance(value, list):
            merged[name] = _merge_stages(old, value)
        elif name != "mixture" and isinstance(old, dict) and isinstance(value, dict):
            merged[name] = _merge(old, value)
        else:
            merged[name] = value
    return merged


def _merge_stages(below: list[Any], above: list[Any]) -> list[Any]:
    """Stages of the same name merge in place; new ones follow in their order, and so does one that is written
    twice, which validation refuses."""
    merged = list(below)
    index_of = {stage.get("name"): index for index, stage in enumerate(below) if isinstance(stage, dict)}
    for stage in above:
        name = stage.get("name") if isinstance(stage, dict) else None
        index = index_of.get(name) if name is not None else None
        whole = stage if index is None else _merge(below[index], stage)
        if index is not None and merged[index] is below[index]:
            merged[index] = whole
        else:
            merged.append(whole)
    return merged


def _apply_override(source: Source, override: str) -> None:
    """`stage.64k.lr=2e-5`, `layout.tp=2`, `stage.64k.mixture.data/books=0.4` over what the files say.

    Raises:
        ValueError: it names no key.
    """
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ValueError("must look like key.path=value, e.g. stage.64k.lr=2e-5")
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError:
        value = text
    key: Key = ()
    target, parts = source.data, path.split(".")
    if parts[0] == "base":
        raise ValueError("a base is named in the recipe file only")
    if parts[0] in ("stage", "stages") and path != "stages":
        target, key, parts = _named_stage(source, parts), ("stages", parts[1]), parts[2:]
    if parts[0] == "mixture" and len(parts) > 1:  # directories may hold dots
        parts = ["mixture", ".".join(parts[1:])]
    for name in parts[:-1]:
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target, key = target[name], (*key, name)
    if parts[-1] in _ALTERNATIVES:
        target.pop(_ALTERNATIVES[parts[-1]], None)
    target[parts[-1]] = value
    source.origin.places[(*key, parts[-1])] = Place(f"override {override!r}")


def _named_stage(source: Source, parts: Sequence[str]) -> dict[str, Any]:
    """What the recipe says of the stage in stage.NAME.KEY; raises ValueError when it has none of that name."""
    stages = [stage for stage in source.data.get("stages") or [] if isinstance(stage, dict)]
    names = [str(stage.get("name")) for stage in stages]
    name = parts[1] if len(parts) > 1 else ""
    if name in names and len(parts) > 2:
        return stages[names.index(name)]
    near = [] if name in names else get_close_matches(name, names, n=1)
    hint = f"did you mean stage.{near[0]}?" if near else f"the stages are {', '.join(names) or 'none'}"
    raise ValueError(f"must name a stage and a key, stage.NAME.KEY=value; {hint}")
