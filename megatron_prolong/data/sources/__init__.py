"""Where documents come from. Every source cuts its input into parts and reads records from a part."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_prolong.data.sources import jsonl, text
from megatron_prolong.data.sources.base import Bad, Part, Record, Source
from megatron_prolong.data.sources.files import COMPRESSED, is_remote
from megatron_prolong.data.sources.grouped import Grouped, is_grouped
from megatron_prolong.data.sources.jsonl import JsonLines
from megatron_prolong.data.sources.repositories import Repositories
from megatron_prolong.data.sources.shards import Shards
from megatron_prolong.data.sources.tables import Parquet, SavedDataset
from megatron_prolong.data.sources.text import Text
from megatron_prolong.errors import UserError

__all__ = ["SOURCES", "Bad", "Part", "Record", "Source", "find_kind", "source_of"]

SOURCES: dict[str, Source] = {
    source.kind: source
    for source in (Repositories(), Text(), JsonLines(), Parquet(), SavedDataset(), Shards(), Grouped())
}
_ENDINGS = {"text": text.SUFFIXES, "jsonl": jsonl.SUFFIXES, "parquet": (".parquet",)}


def source_of(kind: str) -> Source:
    """The source of a kind. Raises UserError naming the known ones."""
    if kind not in SOURCES:
        raise UserError(f"there is no source of kind {kind!r}; known: {', '.join(SOURCES)}, chat")
    return SOURCES[kind]


def find_kind(path: str) -> str:
    """What lies at `path`, told by its files' names. Raises UserError when that leaves a doubt."""
    if is_remote(path) or Path(path).is_file():
        kinds = _kinds([path])
    elif (Path(path) / "index.json").exists():
        kinds = {"grouped" if is_grouped(path) else "mds"}
    elif (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
        kinds = {"hf"}
    elif Path(path).is_dir():
        if any(Path(path).glob("*/.git")):
            return "repositories"
        kinds = _kinds(name for _, _, files in os.walk(path) for name in files)
    else:
        raise UserError(f"{path}: no such file or directory")
    if len(kinds) != 1:
        endings = ", ".join(ending for endings in _ENDINGS.values() for ending in endings)
        found = " and ".join(sorted(kinds)) or f"nothing that ends in {endings}"
        raise UserError(
            f"{path}: cannot tell by the names of its files what kind of source this is ({found}); `prolong data "
            f"tokenize` may be told by --kind {'|'.join(SOURCES)}|chat"
        )
    return kinds.pop()


def _kinds(names: Iterable[str]) -> set[str]:
    kinds: set[str] = set()
    for name in map(str.lower, names):
        for suffix in COMPRESSED:
            name = name.removesuffix(suffix)
        kinds |= {kind for kind, suffixes in _ENDINGS.items() if name.endswith(suffixes)}
    return kinds
