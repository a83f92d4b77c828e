"""Is what a recipe points at there: model, tokenizer, mixture directories. Only JSON files are opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.run_files import RESOLVED_RECIPE
from megatron_prolong.recipe.schema import Stage
from megatron_prolong.recipe.shape import (
    HF_DIR,
    MANIFEST,
    model_directory,
    read_json,
    read_manifest,
    read_shape,
)


def model_problems(path: Path) -> list[str]:
    """What keeps `path` from being a model to start from."""
    try:
        read_shape(path)
    except UserError as error:
        return [_one_line(error)]
    directory = model_directory(path)
    if (directory / MANIFEST).exists():
        complete = (directory / ".metadata").exists()
        return [] if complete else [f"{directory} holds no .metadata: the checkpoint is not complete"]
    if not [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]:
        return [f"{directory} holds no weights: neither *.safetensors nor pytorch_model*.bin"]
    return []


def unfinished_stage(path: Path, stages: Sequence[Stage]) -> str | None:
    """That `path` is a checkpoint from the middle of the last of the `stages_behind` it; None when it is not."""
    directory = model_directory(path)
    if not stages or (step := read_manifest(directory)["step"]) >= stages[-1].num_steps:
        return None
    of = f"{stages[-1].num_steps} of stage {stages[-1].name}"
    return f"{directory} is step {step} of the {of}: finish that first, unless this is meant"


def stages_behind(path: Path) -> list[Stage]:
    """Stages that a checkpoint of ours went through since its run began, its own last, from the recipe beside it.

    Empty where `path` is something else, or the recipe is another version's.
    """
    from megatron_prolong.recipe.load import load_recipe  # which reads a recipe with the help of this file

    directory = model_directory(path)
    if not (directory / MANIFEST).exists() or not (directory / RESOLVED_RECIPE).exists():
        return []
    try:
        name, recipe = read_manifest(directory)["stage"], load_recipe(directory / RESOLVED_RECIPE)
    except UserError:
        return []
    stages: list[Stage] = []
    for stage in recipe.stages:
        stages = [*(stages if stage.carry.weights else []), stage]
        if stage.name == name:
            return stages
    return []


def tokenizer_problems(path: Path) -> list[str]:
    """What keeps `path` from being a tokenizer's directory."""
    try:
        vocabulary_size(path)
    except UserError as error:
        return [_one_line(error)]
    return []


def vocabulary_size(path: Path) -> int:
    """One more than the largest token id of the tokenizer in a directory (a checkpoint keeps it in hf/).

    Raises:
        UserError: there is no readable tokenizer.json.
    """
    return _read_tokenizer(path)[0]


def tokenizer_file(path: Path | str) -> Path:
    """The tokenizer.json of a model, tokenizer, checkpoint or stage directory. Raises UserError without one."""
    directory = model_directory(path)
    for candidate in (directory / "tokenizer.json", directory / HF_DIR / "tokenizer.json"):
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no tokenizer.json there; give the directory on this machine that holds one")


def _read_tokenizer(path: Path) -> tuple[int, str]:
    """Its vocabulary's size, and its fingerprint. A start asks several times; Llama-3's takes a second to read."""
    file = tokenizer_file(path)
    state = file.stat()
    return _size_and_fingerprint(file, (state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache
def _size_and_fingerprint(file: Path, state: tuple[int, ...]) -> tuple[int, str]:
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        size = 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
        return size, fingerprint(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a tokenizer of the tokenizers library ({error!r})") from error


def fingerprint(tokenizer: Mapping[str, Any]) -> str:
    """16 hex digits that two tokenizers (contents of tokenizer.json) share when the same ids are the same tokens.

    Added and special tokens do not count: Llama-3, its Instruct and Llama-3.1 differ in the names of reserved ones
    only, and read each other's data.
    """
    vocabulary = tokenizer["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram: pieces with scores, in the order of their ids
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    special = {token["content"] for token in tokenizer.get("added_tokens", []) if token.get("special")}
    ordinary = {token: number for token, number in vocabulary.items() if token not in special}
    return hashlib.sha256(json.dumps(ordinary, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_fingerprint(path: Path | None) -> str | None:
    """`fingerprint` of the tokenizer in a model's or tokenizer's directory; None when there is none to read."""
    if path is None:
        return None
    try:
        return _read_tokenizer(path)[1]
    except UserError:
        return None


def mixture_problems(path: Path, *, loss_mask: bool, tokenizer: str | None) -> list[str]:
    """What keeps `path` from being one domain of a mixture: a directory of MDS shards.

    tokenizer: fingerprint of the model's, which the data's must be where both are known.
    """
    if not path.is_dir():
        return ["no such directory; pack it first, or correct the path (relative to the working directory)"]
    if not (path / "index.json").is_file():
        return ["no index.json in this directory; it holds no complete MDS shards (see prolong data pack)"]
    try:
        index = read_json(path / "index.json")
    except UserError as error:
        return [_one_line(error)]
    shards, known = index.get("shards"), index.get("tokenizer")
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        return ["its index.json lists no shards (each with samples, column_names and column_encodings)"]
    if not sum(shard["samples"] for shard in shards):
        return ["it is empty: its index.json lists no samples"]
    if known and tokenizer and known != tokenizer:
        return [
            f"its tokens were made with another tokenizer (fingerprint {known}) than the model's ({tokenizer}); "
            "tokenize its source again with the model's, and pack it again"
        ]
    columns = dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=False))
    problems = [_column_problem(columns, "input_ids", "the tokens", "uint32", "uint32")]
    if loss_mask:
        problems.append(_column_problem(columns, "mask", "loss_mask is true", "integers", r"u?int\d+"))
    return [problem for problem in problems if problem]


def _column_problem(
    columns: Mapping[str, str], name: str, reason: str, numbers: str, pattern: str
) -> str | None:
    """What keeps a column from being there with arrays of numbers whose type matches the pattern."""
    if name not in columns:
        return f"no column {name} ({reason}); its columns are {', '.join(sorted(columns))}"
    # An array may leave its type, or its shape, to each sample.
    if not re.fullmatch(rf"ndarray(:{pattern}(:.*)?)?", columns[name]):
        return f"its column {name} is {columns[name]}; it must hold arrays of {numbers}, so write it anew"
    return None


def _is_shard(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("samples"), int):
        return False
    columns = (entry.get("column_names"), entry.get("column_encodings"))
    return all(isinstance(each, list) and all(isinstance(one, str) for one in each) for each in columns)


def _one_line(error: UserError) -> str:
    return " ".join(part.strip(" -") for part in str(error).splitlines())
