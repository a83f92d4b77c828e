"""The engine both directions share: output tensors are cut into chunks of rows, gathered and written.

Memory is bounded by workers × chunk, whatever the size of the model: a chunk is a run of whole rows of one layer
of one tensor, at most CHUNK_BYTES.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.convert.names import Rows, Tensor2D
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.cores import usable_cores
from megatron_prolong.runtime.progress import progress

CHUNK_BYTES = 32 * 2**20
# By default. Two keep the disk reading while the other writes; more only help on parallel file systems. Threads are
# enough: reading, copying, hashing and writing all let go of the interpreter.
WORKERS = min(4, usable_cores())

File = TypeVar("File")
T = TypeVar("T")


class RowSource(Protocol):
    """Something rows can be read from: a Hugging Face directory, a torch_dist checkpoint, random numbers."""

    def dtype(self, rows: Rows) -> torch.dtype:
        """Stored dtype of the tensor the rows belong to."""

    def read_into(self, rows: Rows, out: Tensor) -> None:
        """Fill contiguous `out` [count, …] of the stored dtype. Called from several threads."""


@dataclass(frozen=True)
class Chunk:
    """Rows start … stop of one output tensor, in the dtype they are written in."""

    tensor: Tensor2D
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows] or [rows, columns]."""
        return (self.stop - self.start, *self.tensor.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Size of the rows."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def num_bytes(tensor: Tensor2D, dtype: torch.dtype) -> int:
    """Size of a whole tensor."""
    return tensor.numel * dtype.itemsize


def output_dtype(tensor: Tensor2D, source: RowSource, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, or by default the one the tensor's first row has in the source."""
    return dtype or source.dtype(next(tensor.sources(0, 1)))


def chunks(tensor: Tensor2D, dtype: torch.dtype) -> list[Chunk]:
    """Cut a tensor into runs of rows of at most CHUNK_BYTES (at least one row each)."""
    row_bytes = (tensor.rule.columns or 1) * dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    return [
        Chunk(tensor, start, min(start + step, tensor.rows), dtype) for start in range(0, tensor.rows, step)
    ]


class ChunkBuffer:
    """Memory for one chunk after the other: fresh pages for each would cost the kernel more than the reading."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, chunk: Chunk) -> Tensor:
        """An uninitialised tensor for the chunk; it ends the life of the one before."""
        if len(self._memory) < chunk.num_bytes:
            self._memory = bytearray(chunk.num_bytes)
        flat = torch.frombuffer(self._memory, dtype=chunk.dtype, count=torch.Size(chunk.shape).numel())
        return flat.view(chunk.shape)


def gather(chunk: Chunk, source: RowSource, buffer: ChunkBuffer, *, finite: bool = True) -> Tensor:
    """Read the chunk's rows out of the source, in the chunk's order, shape and dtype, into the buffer.

    Raises:
        UserError: a number must be `finite` and is not: every loss would be NaN.
    """
    out = buffer.take(chunk)
    filled = 0
    for rows in chunk.tensor.sources(chunk.start, chunk.stop):
        part = out[filled : filled + rows.count]
        if (stored := source.dtype(rows)) == chunk.dtype:
            source.read_into(rows, part)
        else:
            piece = torch.empty(part.shape, dtype=stored)
            source.read_into(rows, piece)
            part.copy_(piece)
        if finite and not all(map(math.isfinite, torch.aminmax(part))):  # at the speed of memory
            where = f"{rows.name}, rows {rows.start} to {rows.start + rows.count}"
            layer = "" if rows.layer is None else f" of layer {rows.layer}"
            raise UserError(
                f"{where}{layer}: NaN or infinity as {dtype_name(chunk.dtype)}; fetch the model again, or choose a "
                "wider --dtype"
            )
        filled += rows.count
    return out


def split_files(items: Sequence[Chunk], largest_bytes: int, workers: int) -> list[list[Chunk]]:
    """Cut a list of chunks, in order, into files of about equal size, none larger than `largest_bytes`."""
    total = sum(chunk.num_bytes for chunk in items)
    # One file per worker, so that they can write at once; a small model needs only one.
    wanted = workers if total > workers * CHUNK_BYTES else 1
    share = min(largest_bytes, -(-total // wanted))
    return grouped(items, lambda chunk: chunk.num_bytes, share)


def grouped(items: Sequence[T], num_bytes: Callable[[T], int], largest_bytes: int) -> list[list[T]]:
    """Neighbours together, a new group where the next item would make one larger than `largest_bytes`."""
    groups: list[list[T]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + num_bytes(item) > largest_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += num_bytes(item)
    return groups


def write_files(
    title: str, files: Sequence[list[Chunk]], write: Callable[[int, Iterator[Chunk]], File], workers: int
) -> list[File]:
    """Call `write(number, chunks)` for every file, `workers` at once; its result per file.

    The chunk iterator stops the writer with an exception when another file failed or the user interrupts.
    """
    total = sum(chunk.num_bytes for file in files for chunk in file)
    stop = threading.Event()
    with (
        progress(title, total, in_bytes=True) as advance,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):

        def watched(file: list[Chunk]) -> Iterator[Chunk]:
            for chunk in file:
                if stop.is_set():
                    raise concurrent.futures.CancelledError
                yield chunk
                advance(chunk.num_bytes)

        try:
            futures = [pool.submit(write, number, watched(file)) for number, file in enumerate(files)]
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what went wrong, while others still write
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
