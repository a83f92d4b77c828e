"""Writing a Megatron `torch_dist` checkpoint without Megatron and without torch.distributed.

The format is torch.distributed.checkpoint's (FileSystemWriter), plus `metadata.json` and `common.pt`
(megatron.core.dist_checkpointing.core and .strategies.common): tensors are torch.save'd chunk by chunk into
`.distcp` files, and `.metadata` says where each chunk lies. Megatron loads any layout from any chunks.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prolong.convert.names import LAYERS, Tensor2D
from megatron_prolong.convert.transfer import (
    WORKERS,
    Chunk,
    ChunkBuffer,
    RowSource,
    chunks,
    gather,
    split_files,
    write_files,
)
from megatron_prolong.runtime.checksums import Entries, HashingFile

LARGEST_FILE = 4 * 2**30
# Modules that announce an `_extra_state` object per layer (Transformer Engine keeps FP8 history there). Megatron
# refuses a checkpoint without them; None is what modules without such state save.
_EXTRA_STATE = tuple(
    f"{LAYERS}{module}._extra_state"
    for module in (
        "self_attention.linear_qkv",
        "self_attention.core_attention",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)


def write_torch_dist(
    directory: Path, tensors: list[tuple[Tensor2D, torch.dtype]], source: RowSource, workers: int = WORKERS
) -> Entries:
    """Write the tensors (one entry per layer), read from `source`, into an empty directory.

    `workers` files are written at once.

    Returns:
        Checksums of the files with the tensors.
    """
    items = [chunk for tensor, dtype in tensors for chunk in chunks(tensor, dtype)]

    sums: Entries = {}

    def write(number: int, file_chunks: Iterator[Chunk]) -> list[tuple[Chunk, _StorageInfo]]:
        name = f"__0_{number}.distcp"
        entries = []
        buffer = ChunkBuffer()
        with (directory / name).open("wb") as raw:
            file: Any = HashingFile(raw)
            for chunk in file_chunks:
                offset = file.tell()
                torch.save(gather(chunk, source, buffer).view(_stored_shape(chunk)), file)
                entries.append((chunk, _StorageInfo(name, offset, file.tell() - offset)))
            sums[name] = file.entry
        return entries

    written = write_files(
        "writing Megatron checkpoint", split_files(items, LARGEST_FILE, workers), write, workers
    )
    entries = [entry for file in written for entry in file]
    contents = _table_of_contents(tensors, entries)
    _add_empty_extra_state(directory, contents)
    (directory / ".metadata").write_bytes(pickle.dumps(contents))
    _save({}, directory / "common.pt")
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(config))
    return sums


def _table_of_contents(
    tensors: list[tuple[Tensor2D, torch.dtype]], entries: list[tuple[Chunk, _StorageInfo]]
) -> Metadata:
    table: dict[str, TensorStorageMetadata] = {}
    for tensor, dtype in tensors:
        layers = 1 if tensor.layer is None else tensor.layer + 1
        size = tensor.shape if tensor.layer is None else (layers, *tensor.shape)
        table.setdefault(
            tensor.name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
        )
        table[tensor.name].size = torch.Size(size)  # the last layer leaves the number of layers
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for chunk, info in entries:
        tensor = chunk.tensor
        start = (chunk.start, *(0 for _ in tensor.shape[1:]))
        offsets = torch.Size(start if tensor.layer is None else (tensor.layer, *start))
        storage[MetadataIndex(tensor.name, offsets)] = info
        table[tensor.name].chunks.append(ChunkStorageMetadata(offsets, torch.Size(_stored_shape(chunk))))
    return Metadata(
        state_dict_metadata=dict(table), planner_data={}, storage_data=storage, version=CURRENT_DCP_VERSION
    )


def _add_empty_extra_state(directory: Path, contents: Metadata) -> None:
    """One object per module, under Megatron's ShardedObject.unique_key; all share the same bytes."""
    num_layers = next(
        entry.size[0]
        for key, entry in contents.state_dict_metadata.items()
        if key.startswith(LAYERS) and isinstance(entry, TensorStorageMetadata)
    )
    name = "__0_extra_state.distcp"
    _save([None], directory / name)
    info = _StorageInfo(name, 0, (directory / name).stat().st_size)
    keys = [f"{module}/shard_{layer}_{num_layers}" for module in _EXTRA_STATE for layer in range(num_layers)]
    keys.append("decoder.final_layernorm._extra_state/shard_0_1")  # Transformer Engine's norms announce one
    for key in keys:
        contents.state_dict_metadata[key] = BytesStorageMetadata()
        contents.storage_data[MetadataIndex(key)] = info


def _save(content: object, path: Path) -> None:
    """torch.save; given the path itself, it would not tell that the disk is full."""
    with path.open("wb") as file:
        torch.save(content, file)


def _stored_shape(chunk: Chunk) -> tuple[int, ...]:
    return chunk.shape if chunk.tensor.layer is None else (1, *chunk.shape)
