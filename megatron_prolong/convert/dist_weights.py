"""The weights of a Megatron `torch_dist` checkpoint, read row by row, whatever layout saved it.

Such a directory is torch.distributed.checkpoint's: `.metadata` says which chunk of which tensor lies in which
file at which offset; every chunk is a small zip written by torch.save. A chunk's raw bytes lie uncompressed in
that zip, so they are read in place, without torch.load.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_prolong.convert.names import LAYERS, Rows, rules
from megatron_prolong.convert.positioned import PositionedFiles
from megatron_prolong.convert.saved_tensor import locate_tensor
from megatron_prolong.convert.unpickle import load_metadata
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import ModelShape, read_json

# Names of the native layer spec's norms -> Transformer Engine's, which the mapping uses.
_ALIASES = {
    f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": f"{LAYERS}input_layernorm.weight",
    f"{LAYERS}mlp.linear_fc1.layer_norm_weight": f"{LAYERS}pre_mlp_layernorm.weight",
}
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Chunk:
    """A box of one tensor (layers × rows × columns, each start … stop) and where its zip and bytes are."""

    layers: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    path: Path
    offset: int
    length: int
    data_offset: int | None = None


class DistWeights:
    """Model tensors of a torch_dist checkpoint by Megatron name and layer.

    Raises:
        UserError: not a torch_dist checkpoint, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        backend = read_json(directory / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(f"{directory}: format {backend!r}; only Megatron's torch_dist can be read")
        self._metadata = load_metadata(directory / ".metadata")
        self._files = PositionedFiles()
        self._chunks: dict[str, dict[int | None, list[_Chunk]]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, rows: Rows) -> torch.dtype:
        """Stored dtype of the tensor the rows belong to."""
        key, _ = self._stored(rows.name, rows.layer)
        return self.tensors[key].properties.dtype

    def read_into(self, rows: Rows, out: Tensor) -> None:
        """Fill contiguous `out` [count, …] of the stored dtype."""
        key, layer = self._stored(rows.name, rows.layer)
        out_2d = out.view(rows.count, -1)
        width = out_2d.shape[1]
        filled = 0
        for chunk in self._chunks_of(key, layer):
            start = max(rows.start, chunk.rows[0])
            stop = min(rows.start + rows.count, chunk.rows[1])
            if start >= stop:
                continue
            part = out_2d[start - rows.start : stop - rows.start]
            left, right = chunk.columns
            layers_before = 0 if layer is None else layer - chunk.layers[0]
            rows_before = layers_before * (chunk.rows[1] - chunk.rows[0]) + start - chunk.rows[0]
            offset = self._data_offset(chunk, out.dtype) + rows_before * (right - left) * out.element_size()
            if right - left == width:
                self._files.read_into(chunk.path, offset, part)
            else:
                piece = torch.empty(stop - start, right - left, dtype=out.dtype)
                self._files.read_into(chunk.path, offset, piece)
                part[:, left:right] = piece
            filled += (stop - start) * (right - left)
        if filled != rows.count * width:
            raise UserError(f"{self.directory}: {key} has chunks that overlap or are missing")

    def check(self, shape: ModelShape) -> None:
        """Compare names and shapes with what a model of `shape` needs; a padded vocabulary is fine.

        Raises:
            UserError: listing every missing, unexpected or misshapen tensor.
        """
        problems: list[str] = []
        wanted: set[str] = set()
        for rule in rules(shape):
            for layer in range(shape.num_layers) if rule.per_layer else [None]:
                key, stacked = self._stored(rule.key, layer)
                if key in wanted:
                    continue
                wanted.add(key)
                layers = () if stacked is None else (shape.num_layers,)
                problems += self._check_tensor(key, (*layers, *rule.shape))
        problems += [
            f"{key}: unexpected, not part of this Llama"
            for key in self.tensors
            if key.startswith(_MODEL_PREFIXES) and key not in wanted
        ]
        if problems:
            raise UserError.many(f"{self.directory}: the tensors do not match the model's shape:", problems)

    def listing(self) -> list[tuple[str, tuple[int, ...], torch.dtype, int]]:
        """Every tensor, optimizer state too: name, shape, dtype, number of chunks."""
        return [
            (key, tuple(entry.size), entry.properties.dtype, len(entry.chunks))
            for key, entry in self.tensors.items()
        ]

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _check_tensor(self, key: str, expected: tuple[int, ...]) -> list[str]:
        if key not in self.tensors:
            return [f"{key}: missing"]
        entry = self.tensors[key]
        found = tuple(entry.size)
        padded = key in _VOCABULARY and found[1:] == expected[1:] and found[0] >= expected[0]
        if found != expected and not padded:
            return [f"{key}: shape {list(found)}, expected {list(expected)}"]
        if entry.properties.dtype not in _DTYPES:
            return [f"{key}: dtype {entry.properties.dtype}; only fp32, fp16 and bf16 are supported"]
        return []

    def _stored(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """The name a tensor is stored under, and the layer to take of it (None: layers are not stacked)."""
        for name in (key, _ALIASES.get(key, key)):
            if name in self.tensors:
                return name, layer
            own = name.replace(LAYERS, f"{LAYERS}{layer}.", 1)
            if layer is not None and own in self.tensors:
                return own, None
        return key, layer

    def _chunks_of(self, key: str, layer: int | None) -> list[_Chunk]:
        """The chunks that hold rows of this layer."""
        if key not in self._chunks:
            by_layer: dict[int | None, list[_Chunk]] = defaultdict(list)
            for entry in self.tensors[key].chunks:
                chunk = self._chunk(key, entry.offsets, entry.sizes, stacked=layer is not None)
                for index in [None] if layer is None else range(*chunk.layers):
                    by_layer[index].append(chunk)
            self._chunks[key] = by_layer
        return self._chunks[key].get(layer, [])

    def _chunk(self, key: str, offsets: torch.Size, sizes: torch.Size, *, stacked: bool) -> _Chunk:
        info = self._metadata.storage_data[MetadataIndex(key, offsets)]
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.directory}: {key} is stored compressed, which cannot be read here")
        spans = [(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
        layers = spans.pop(0) if stacked else (0, 1)
        rows, columns = spans if len(spans) == 2 else (spans[0], (0, 1))
        return _Chunk(layers, rows, columns, self.directory / info.relative_path, info.offset, info.length)

    def _data_offset(self, chunk: _Chunk, dtype: torch.dtype) -> int:
        if chunk.data_offset is None:
            spans = (chunk.layers, chunk.rows, chunk.columns)
            numel = math.prod(stop - start for start, stop in spans)
            chunk.data_offset = locate_tensor(
                self._files, chunk.path, chunk.offset, chunk.length, dtype, numel
            )
        return chunk.data_offset
