"""Tables: Parquet files (pyarrow) and Hugging Face datasets saved on disk (datasets). One document per row.

Both packages are optional and imported when such a source is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prolong.data.sources.base import Bad, Part, Record
from megatron_prolong.data.sources.files import is_remote, list_files
from megatron_prolong.errors import UserError

_ROWS_AT_ONCE = 256
_PART_BYTES = 1 << 26


class Parquet:
    kind = "parquet"
    about = "Parquet files (needs pyarrow): one document per row, in the column `text`"

    def parts(self, path: str) -> list[Part]:
        parts: list[Part] = []
        for name, _ in list_files(path, (".parquet",)):
            metadata = _open_parquet(name).metadata
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
            parts += [Part(name, group, group + 1, size) for group, size in enumerate(sizes)]
        return parts

    def read(self, part: Part) -> Iterator[Record | Bad]:
        file = _open_parquet(part.path)
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        groups = list(range(part.start, part.stop))
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=groups)
        while (batch := _next_batch(batches, f"{part.path}, rows from {row}")) is not None:
            for fields in batch:
                yield Record(f"{part.path}, row {row}", fields)
                row += 1


def _next_batch(batches: Iterator[Any], where: str) -> list[dict[str, Any]] | None:
    """Rows; None at the end. Raises UserError where the file is damaged."""
    import pyarrow

    try:
        batch = next(batches, None)
        return None if batch is None else batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}); fetch the file again") from None


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'megatron-prolong[data]'") from None
    try:
        if is_remote(path):
            import fsspec

            return pyarrow.parquet.ParquetFile(fsspec.open(path, "rb").open())
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None


class SavedDataset:
    kind = "hf"
    about = "a Hugging Face dataset written by save_to_disk (needs datasets): one document per row"

    def parts(self, path: str) -> list[Part]:
        data = _open_dataset(path)
        num_rows, num_bytes = len(data), max(int(data.data.nbytes), 1)
        step = max(1, num_rows * _PART_BYTES // num_bytes)
        return [
            Part(
                path, start, min(start + step, num_rows), num_bytes * min(step, num_rows - start) // num_rows
            )
            for start in range(0, num_rows, step)
        ]

    def read(self, part: Part) -> Iterator[Record | Bad]:
        data = _open_dataset(part.path)
        for start in range(part.start, part.stop, _ROWS_AT_ONCE):
            columns = data[start : min(start + _ROWS_AT_ONCE, part.stop)]
            for row, values in enumerate(zip(*columns.values(), strict=True), start):
                yield Record(f"{part.path}, row {row}", dict(zip(columns, values, strict=True)))


def _open_dataset(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: needs the package datasets: pip install 'megatron-prolong[data]'") from None
    if not is_remote(path) and not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; expected a dataset written by save_to_disk")
    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a dataset written by save_to_disk ({error})") from None
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(data)}; name one of these subdirectories")
    return data
