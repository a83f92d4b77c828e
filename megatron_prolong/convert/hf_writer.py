"""Writing Hugging Face safetensors shards as a stream: the header is known before the first byte of data.

The safetensors library wants a whole shard (5 GB) in memory; this needs one chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_prolong.convert.hf_weights import SAFETENSORS_DTYPES
from megatron_prolong.convert.names import Tensor2D
from megatron_prolong.convert.positioned import tensor_bytes
from megatron_prolong.convert.transfer import (
    WORKERS,
    Chunk,
    ChunkBuffer,
    RowSource,
    chunks,
    gather,
    grouped,
    num_bytes,
    write_files,
)

LARGEST_SHARD = 5 * 10**9  # bytes; transformers' own default for Llama-3
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    directory: Path, tensors: list[tuple[Tensor2D, torch.dtype]], source: RowSource, workers: int = WORKERS
) -> None:
    """Write model.safetensors, or model-0000n-of-0000N.safetensors (`workers` at once) and their index."""
    # Whole tensors, in the order of the model.
    shards = grouped(tensors, lambda entry: num_bytes(*entry), LARGEST_SHARD)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    items = [[chunk for tensor, dtype in shard for chunk in chunks(tensor, dtype)] for shard in shards]

    def write(number: int, shard_chunks: Iterator[Chunk]) -> None:
        buffer = ChunkBuffer()
        with (directory / names[number]).open("wb") as file:
            file.write(_header(shards[number]))
            for chunk in shard_chunks:
                file.write(tensor_bytes(gather(chunk, source, buffer)))

    write_files("writing safetensors", items, write, workers)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(num_bytes(*entry) for entry in tensors)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard
            },
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: list[tuple[Tensor2D, torch.dtype]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, dtype in shard:
        end = offset + num_bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # data starts aligned
    return len(content).to_bytes(8, "little") + content
