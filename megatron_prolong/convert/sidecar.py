"""The files beside the weights (config, generation config, tokenizer, chat template) and how they travel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_prolong.data.chat import ChatError, apply_template, control_tokens
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import TOKENIZER_FILES, ModelShape, read_json, to_hf_config

_GENERATION_CONFIG = "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MODEL = ("config.json", _GENERATION_CONFIG)
_TOKENIZER = (_GENERATION_CONFIG, *TOKENIZER_FILES)  # it says at which tokens an answer ends
_TOKENIZER_CONFIG = "tokenizer_config.json"


def copy_sidecar(source: Path, target: Path, tokenizer: Path | None = None) -> None:
    """Copy what travels along from a Hugging Face directory (links are followed); missing files are fine.

    Args:
        tokenizer: directory that the tokenizer's files are taken from; `source` by default, and for the generation
            config where it has none.

    Raises:
        UserError: a link leads nowhere, as in a cache whose download is not complete; or a .json file is not JSON,
            which whoever reads the copy could not trace back to here.
    """
    target.mkdir(parents=True, exist_ok=True)
    parts = ((source, _MODEL), (tokenizer or source, _TOKENIZER))
    paths = [(origin, path) for origin, names in parts for path in _matching(origin, names)]
    if broken := [str(path) for _, path in paths if not path.exists()]:
        raise UserError.many(
            "these links lead nowhere; fetch the model again, or remove them:", sorted(broken)
        )
    found = {path.relative_to(origin): path for origin, path in paths if path.is_file()}
    for place, path in sorted(found.items()):
        if path.suffix == ".json":
            read_json(path)
        (target / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / place)


def check_sidecar(directory: Path) -> None:
    """Raises UserError where nothing is that would travel along, and for a config of another kind of model: what it
    says beyond a Llama's shape (architectures, quantization_config) would stay in the export's."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face model or its tokenizer")
    if not _matching(directory, (*_MODEL, *_TOKENIZER)):
        raise UserError(
            f"{directory}: neither a config nor a tokenizer is there; expected a Hugging Face model or its "
            "tokenizer (without --hf what came with the checkpoint is taken)"
        )
    if (config := directory / "config.json").exists():
        ModelShape.from_hf(read_json(config), f"{config} (a directory without one gives the tokenizer alone)")


def _matching(origin: Path, names: Sequence[str]) -> list[Path]:
    """What is there under these names; links to nothing too, which globbing for a name would pass over."""
    places = [origin / name for name in names]
    return [path for place in places for path in place.parent.glob("*") if path.match(place.name)]


def has_tokenizer(directory: Path) -> bool:
    """Whether transformers finds a vocabulary there; its settings and chat template alone are none."""
    return any((directory / name).exists() for name in _VOCABULARIES)


def exported_config(shape: ModelShape, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """config.json of an export, readable by transformers 4 (torch_dtype) and 5 (dtype)."""
    return {**to_hf_config(shape, source), "torch_dtype": dtype, "dtype": dtype}


def write_tokenizers_config(directory: Path, config: dict[str, Any]) -> None:
    """config.json of a model that has none: the tokenizer says where texts begin and end.

    Also a generation config, unless one came along, by which answers end with a turn, as Meta's Instruct models
    have it.
    """
    special, generation = _special_tokens(directory), directory / _GENERATION_CONFIG
    write_config(directory, {**config, **special})
    if not generation.exists() and (end_of_turn := _end_of_turn(directory)) is not None:
        stops = sorted({special.get("eos_token_id", end_of_turn), end_of_turn})
        generation.write_text(json.dumps({**special, "eos_token_id": stops}, indent=2) + "\n")


def _special_tokens(directory: Path) -> dict[str, int]:
    """bos_token_id and eos_token_id of the tokenizer there, from the names in tokenizer_config.json."""
    path, names = directory / "tokenizer.json", directory / _TOKENIZER_CONFIG
    if not path.exists() or not names.exists():
        return {}
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"tokenizer.json: no tokenizer that can be read here ({error})") from error
    config, ids = read_json(names), {}
    for role in ("bos_token", "eos_token"):
        name = config.get(role)
        token = name.get("content") if isinstance(name, dict) else name
        if token is not None and (number := tokenizer.token_to_id(token)) is not None:
            ids[f"{role}_id"] = number
    return ids


def _end_of_turn(directory: Path) -> int | None:
    """The control token that the chat template writes after an answer, such as <|eot_id|>; None without one."""
    from transformers import AutoTokenizer

    if not (directory / _TOKENIZER_CONFIG).exists():
        return None
    chat = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]
    # A tokenizer that transformers cannot read, or without a template; a template that no chat can be trained with.
    with suppress(OSError, KeyError, TypeError, ValueError, ChatError):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        ending = apply_template(tokenizer, chat).rpartition("Well.")[2]
        if found := control_tokens(tokenizer).search(ending):
            return int(tokenizer.convert_tokens_to_ids(found[0]))
    return None


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def raise_limits(directory: Path, max_length: int) -> list[str]:
    """Let the tokenizer and `generate` accept the model's length: their limits are raised where they are lower.

    Returns:
        A line for each, saying so.
    """
    changes = []
    for name, field in ((_TOKENIZER_CONFIG, "model_max_length"), (_GENERATION_CONFIG, "max_length")):
        path = directory / name
        config = read_json(path) if path.exists() else {}
        limit = config.get(field)
        if isinstance(limit, int) and limit < max_length:
            config[field] = max_length
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            changes.append(f"{name}: {field}: {limit} -> {max_length}")
    return changes


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Field-by-field difference of two config.json, one line per field."""
    lines = []
    for field in sorted(old.keys() | new.keys()):
        if field not in old:
            lines.append(f"{field}: (absent) -> {json.dumps(new[field])}")
        elif field not in new:
            lines.append(f"{field}: {json.dumps(old[field])} -> (absent)")
        elif old[field] != new[field]:
            lines.append(f"{field}: {json.dumps(old[field])} -> {json.dumps(new[field])}")
    return lines
