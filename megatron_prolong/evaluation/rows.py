"""Reading example rows: JSON lines, JSON, Parquet, and data sets saved by Hugging Face `datasets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.task import Row


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl file, or of a .json file (a list, or an object whose `data` is one).

    Raises:
        UserError: missing or malformed, naming file and line.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; `prolong eval data check` says how to get it")
    if path.suffix == ".jsonl":
        return [row for _, row in _json_lines(path)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    return list(content["data"] if isinstance(content, dict) else content)


def read_chosen(
    path: Path, name: Callable[[Row], Any], choose: Callable[[set[Any]], Collection[Any]]
) -> list[Row]:
    """The rows of a .jsonl file whose names are chosen, in order.

    HELMET asks a tenth of what its files hold, which are gigabytes at 128K: no more than the chosen rows are kept.

    Args:
        name: of a row; None for one that is not to be asked.
        choose: some of all names.
    """
    names = {place: name(row) for place, row in _json_lines(path)}
    chosen = choose({each for each in names.values() if each is not None})
    with path.open("rb") as file:
        return [_row_at(file, place) for place, each in names.items() if each in chosen]


def _row_at(file: IO[bytes], place: int) -> Row:
    file.seek(place)
    row: Row = json.loads(file.readline())
    return row


def read_split(directory: Path, split: str, columns: list[str] | None = None) -> list[Row]:
    """One split of a data set on disk: SPLIT.jsonl, SPLIT.json, SPLIT*.parquet, or save_to_disk's SPLIT/.

    Args:
        columns: the only ones wanted; the rest may be left unread (NarrativeQA's stories take ten gigabytes).
    """
    for suffix in (".jsonl", ".json"):
        if (path := directory / f"{split}{suffix}").exists():
            return read_rows(path)
    if parts := sorted(directory.glob(f"{split}*.parquet")):
        seen: dict[str, str] = {}
        return [row for part in parts for row in _parquet(part, columns, seen)]
    if (directory / split / "state.json").exists():
        saved = _saved(directory / split)
        return list(saved.select_columns(columns) if columns else saved)
    raise UserError(
        f"{directory}: no split {split} ({split}.jsonl, {split}*.parquet, or a folder written by save_to_disk); "
        "`prolong eval data check` says how to get it"
    )


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Every row, and where in the file its line begins."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield place, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from error
            place += len(line)


def _parquet(path: Path, columns: list[str] | None, seen: dict[str, str]) -> Iterator[Row]:
    """Every row. A text of `seen` is not kept twice: NarrativeQA repeats each story for some thirty questions."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pip install 'megatron-prolong[data]'") from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(64, columns=columns):
            yield from (_sharing(row, seen) for row in batch.to_pylist())


def _sharing(value: Any, seen: dict[str, str]) -> Any:
    """The value, or fields of it, with the texts that were seen before as the same objects."""
    if isinstance(value, dict):
        return {name: _sharing(each, seen) for name, each in value.items()}
    return seen.setdefault(value, value) if isinstance(value, str) else value


def _saved(directory: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise UserError(f"{directory}: reading this needs pip install 'megatron-prolong[data]'") from error
    return load_from_disk(str(directory))
