"""index.json: which shards a data set has, with their columns, sizes and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import is_url

INDEX = "index.json"


@dataclass(frozen=True)
class File:
    """One file as the index describes it. basename: relative to the data set, with forward slashes."""

    basename: str
    num_bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """One shard: its file as it is read (raw) and, if compressed, as it was delivered (packed).

    first: number of its first sample in the data set. columns: name to encoding, in the order of the file.
    sizes: bytes of every value of these columns, None where they vary.
    """

    directory: Path
    first: int
    num_samples: int
    columns: Mapping[str, str]
    sizes: Mapping[str, int | None]
    compression: str | None
    raw: File
    packed: File | None

    @property
    def path(self) -> Path:
        """The uncompressed file (which need not exist yet if the shard is compressed)."""
        return self.directory / self.raw.basename

    @property
    def delivered(self) -> tuple[Path, File]:
        """The file that came with the data set: the compressed one if there is one."""
        file = self.packed or self.raw
        return self.directory / file.basename, file


@dataclass(frozen=True)
class Index:
    """tokenizer: fingerprint (recipe/inputs.py) of the one that made the tokens; None where it is not known."""

    shards: list[Shard]
    tokenizer: str | None


def read_index(directory: Path) -> Index:
    """Parse and check `directory/index.json`.

    Raises UserError naming the file when it is missing, not JSON, of another version or format, or when
    the shards' columns differ.
    """
    path = Path(directory) / INDEX
    try:
        content = json.loads(path.read_bytes())
        entries, tokenizer = list(content["shards"]), content.get("tokenizer")
        if not isinstance(tokenizer, str | None):
            raise TypeError(f"tokenizer is {tokenizer!r}, not a fingerprint")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_missing(Path(directory))) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the index of an MDS data set ({error}); fetch or write it again"
        ) from None
    shards: list[Shard] = []
    first = 0
    for number, entry in enumerate(entries):
        try:
            shard = _parse(Path(directory), first, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, shard {number}: {error!r}; fetch or write the index again") from None
        if shards and list(shard.columns.items()) != list(shards[0].columns.items()):  # in the same order too
            raise UserError(
                f"{path}: shard {shard.raw.basename} has the columns {_show(shard.columns)}, "
                f"but {shards[0].raw.basename} has {_show(shards[0].columns)}; keep such data sets apart"
            )
        shards.append(shard)
        first += shard.num_samples
    return Index(shards, tokenizer)


def index_text(shards: Sequence[Mapping[str, Any]], tokenizer: str | None) -> str:
    """The content of an index.json. Other readers of the format ignore the key `tokenizer`."""
    content = {"version": 2, "shards": shards}
    return json.dumps(content if tokenizer is None else content | {"tokenizer": tokenizer}, sort_keys=True)


def common_tokenizer(tokenizers: Mapping[str, str | None]) -> str | None:
    """The fingerprint of several data sets or tokenizers, by directory; an unknown one goes with any.

    Raises UserError naming two that differ.
    """
    known = {tokenizer: directory for directory, tokenizer in tokenizers.items() if tokenizer is not None}
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise UserError(
            f"{first} and {second} are of different tokenizers (fingerprints {one} and {other}); tokenize one "
            "again, or keep them apart"
        )
    return next(iter(known), None)


def _show(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _missing(directory: Path) -> str:
    if is_url(directory):
        return f"{directory}: MDS data sets are memory-mapped, so copy it to a disk first (aws s3 sync, …)"
    final = directory.with_suffix("") if directory.suffix == ".partial" else directory
    unfinished = directory.parent / f"{final.name}.partial"  # where data/job.py works
    if unfinished.exists():
        return (
            f"{directory}: {unfinished} is of a job that is not finished; run its command again, for {final}"
        )
    if not directory.exists():
        return f"{directory}: no such directory; expected an MDS data set (a directory with {INDEX})"
    parts = sorted(path.parent.name for path in directory.glob(f"*/{INDEX}")) if directory.is_dir() else []
    if parts:
        shown = ", ".join(parts[:3]) + (", …" if len(parts) > 3 else "")
        return (
            f"{directory}: no {INDEX}, but {len(parts)} subdirectories have one ({shown}); "
            f"name one of them, or join them with `prolong data merge {directory}`"
        )
    return f"{directory}: not an MDS data set, there is no {INDEX}"


def _parse(directory: Path, first: int, entry: Mapping[str, Any]) -> Shard:
    if entry["version"] != 2 or entry["format"] != "mds":
        raise ValueError(f"format {entry['format']!r} version {entry['version']}, expected 'mds' version 2")
    raw, packed = _file(entry["raw_data"]), entry.get("zip_data")
    columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if not all(isinstance(word, str) for column in columns.items() for word in column):
        raise ValueError(f"columns {columns}, expected names and encodings")
    return Shard(
        directory=directory,
        first=first,
        num_samples=int(entry["samples"]),
        columns=columns,
        sizes=dict(zip(entry["column_names"], entry["column_sizes"], strict=True)),
        compression=entry["compression"],
        raw=raw,
        packed=_file(packed) if packed else None,
    )


def _file(entry: Mapping[str, Any]) -> File:
    name = PurePosixPath(entry["basename"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"file {name} lies outside the data set")
    return File(str(name), int(entry["bytes"]), dict(entry.get("hashes") or {}))


def hasher(algorithm: str) -> Any:
    """A fresh hash object with update() and hexdigest(): xxhash's algorithms and hashlib's.

    Raises UserError for an unknown algorithm.
    """
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)()
    if algorithm in hashlib.algorithms_available and not algorithm.startswith("shake_"):
        return hashlib.new(algorithm)
    raise UserError(f"unknown hash {algorithm!r}; known: xxh64, xxh128, sha1, sha256, … (xxhash, hashlib)")


def hash_parts(algorithms: Iterable[str], parts: Iterable[bytes | memoryview]) -> dict[str, str]:
    """Hexadecimal hashes, by algorithm, of a file given as parts."""
    hashers = {algorithm: hasher(algorithm) for algorithm in algorithms}
    for part in parts:
        for each in hashers.values():
            each.update(part)
    return {algorithm: each.hexdigest() for algorithm, each in hashers.items()}


def check_hashes(path: Path, expected: Mapping[str, str], parts: Iterable[bytes | memoryview]) -> None:
    """Compare the hashes of a file, given as parts, with the index. Raises UserError naming file and hash."""
    for algorithm, found in hash_parts(expected, parts).items():
        if found != expected[algorithm]:
            raise UserError(
                f"{path}: its {algorithm} is {found}, {INDEX} says {expected[algorithm]}; "
                "the file is damaged, fetch or write it again"
            )
