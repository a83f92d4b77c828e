"""The weights of a Hugging Face directory, read row by row: safetensors, or legacy pytorch_model*.bin."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.convert.names import Rows, Tensor2D, hf_tensors, megatron_tensors
from megatron_prolong.convert.positioned import PositionedFiles
from megatron_prolong.convert.transfer import chunks
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import ModelShape, read_json

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those of quantised and other models are refused, by their own names.
_KNOWN_DTYPES = {
    **SAFETENSORS_DTYPES,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_POINTER = b"version "  # a clone without Git LFS has a small text in place of each large file
_HEAD = "lm_head.weight"
# Buffers that old checkpoints carry and that are computed, not trained.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: in a file at an offset, or (legacy .bin) in a memory-mapped tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    mapped: Tensor | None = None


class HFWeights:
    """Tensors of a Hugging Face directory by name; nothing but headers is read before `check` and `read_into`.

    Raises:
        UserError: no weights, a missing or damaged shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = PositionedFiles()
        self._tensors: dict[str, _Stored] = {}
        for path in _shards(directory):
            stored = _read_bin(path) if path.suffix == ".bin" else _read_header(path)
            if twice := stored.keys() & self._tensors.keys():
                raise UserError.many(
                    f"{path}: holds what another shard holds too; remove one:", sorted(twice)
                )
            self._tensors.update(stored)

    def dtype(self, rows: Rows) -> torch.dtype:
        """Stored dtype of the tensor the rows belong to."""
        return self._tensors[rows.name].dtype

    def read_into(self, rows: Rows, out: Tensor) -> None:
        """Fill contiguous `out` [count, …] of the stored dtype."""
        stored = self._tensors[rows.name]
        if stored.mapped is not None:
            out.copy_(stored.mapped[rows.start : rows.start + rows.count])
            return
        row_bytes = out[:1].numel() * out.element_size()
        self._files.read_into(stored.path, stored.offset + rows.start * row_bytes, out)

    def check(self, shape: ModelShape) -> None:
        """Compare names, shapes and dtypes with what a model of `shape` needs; a head that is said to be the
        embedding must hold the same numbers.

        Raises:
            UserError: listing every missing, unexpected or misshapen tensor; one sentence where all are missing.
        """
        wanted = {tensor.name: tensor.shape for tensor in hf_tensors(shape)}
        if self._tensors and not wanted.keys() & self._tensors.keys():
            raise UserError(
                f"{self.directory}: no tensor is named as in a LlamaForCausalLM: found such as "
                f"{min(self._tensors)}, expected such as {next(iter(wanted))}; save the whole model, with its head"
            )
        ignored = {_HEAD} if shape.tie_embeddings else set()
        problems = [f"{name}: missing" for name in wanted if name not in self._tensors]
        for name, stored in self._tensors.items():
            if name in wanted and stored.shape != wanted[name]:
                problems.append(
                    f"{name}: shape {list(stored.shape)}, config.json asks for {list(wanted[name])}"
                )
            elif name in wanted and stored.dtype not in SAFETENSORS_DTYPES.values():
                problems.append(f"{name}: dtype {stored.dtype}; only fp32, fp16 and bf16 are supported")
            elif name not in wanted and name not in ignored and not name.endswith(_IGNORED_SUFFIXES):
                problems.append(f"{name}: unexpected, not part of this Llama")
        if problems:
            raise UserError.many(f"{self.directory}: the weights do not match config.json:", problems)
        embedding = hf_tensors(shape)[0]
        if ignored & self._tensors.keys() and not self._equal(embedding, _HEAD):
            raise UserError(
                f"{self.directory}: config.json ties {_HEAD} to {embedding.name}, but the two differ; set "
                "tie_word_embeddings: false there, or remove the tensor that should not count"
            )

    def _equal(self, tensor: Tensor2D, other: str) -> bool:
        """Whether `other` is the same bytes, read chunk by chunk."""
        stored = [self._tensors[name] for name in (tensor.name, other)]
        if stored[0].dtype != stored[1].dtype or stored[0].shape != stored[1].shape:
            return False
        for chunk in chunks(tensor, stored[0].dtype):
            pair = torch.empty(2, *chunk.shape, dtype=chunk.dtype)
            for name, part in zip((tensor.name, other), pair, strict=True):
                self.read_into(Rows(name, None, chunk.start, chunk.stop - chunk.start), part)
            if not torch.equal(*pair.view(torch.uint8)):
                return False
        return True

    def check_dtypes(self, shape: ModelShape) -> None:
        """Refuse weights that Megatron has as one tensor (of all layers; queries, keys and values) in two dtypes.

        Raises:
            UserError: naming the tensors in the rarer ones.
        """
        together: dict[str, dict[str, torch.dtype]] = defaultdict(dict)
        for tensor in megatron_tensors(shape):
            for rows in tensor.sources(0, tensor.rows):
                together[tensor.name][rows.name] = self.dtype(rows)
        odd: list[str] = []
        for dtypes in together.values():
            usual, _ = Counter(dtypes.values()).most_common(1)[0]
            odd += [
                f"{name}: {dtype_name(dtype)}, but {dtype_name(usual)} beside it"
                for name, dtype in dtypes.items()
                if dtype != usual
            ]
        if odd:
            raise UserError.many(
                f"{self.directory}: Megatron keeps these in one tensor with others; choose one --dtype:", odd
            )

    def listing(self) -> list[tuple[str, tuple[int, ...], torch.dtype, int]]:
        """Every tensor: name, shape, dtype, and 1, for it lies in one piece."""
        return [(name, stored.shape, stored.dtype, 1) for name, stored in self._tensors.items()]

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _shards(directory: Path) -> list[Path]:
    """The weight files, all of which exist; one file before an index, as transformers takes them."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) for name in weight_map.values()
            ):
                raise UserError(f"{directory / index}: it has no weight_map of names to files; copy it again")
            paths = [directory / name for name in sorted(set(weight_map.values()))]
            missing = [path.name for path in paths if not path.exists()]
            if missing:
                raise UserError.many(f"{directory}: shards named in {index} are missing:", missing)
            return paths
    raise UserError(f"{directory}: no weights; expected model.safetensors, or its shards with their index")


def _read_header(path: Path) -> dict[str, _Stored]:
    """Parse a safetensors header: u64 little-endian length, JSON, then the data.

    Offsets are checked against the file's size, so that a truncated file is found before anything is written.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _POINTER:
            raise UserError(
                f"{path}: only Git LFS's pointer to it; fetch the file itself, by `git lfs pull` or `hf download`"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path}: truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            stored = {name: _from_header(path, 8 + length, entry) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + length
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged safetensors header ({error!r})") from error
    if end != size:
        raise UserError(
            f"{path}: {size} bytes long, but its header describes {end}; the file is truncated or damaged"
        )
    return stored


def _from_header(path: Path, data_start: int, entry: dict[str, Any]) -> _Stored:
    # What is not known (four bits, complex) gets a placeholder: `check` complains about it, unless it is ignored.
    dtype = _KNOWN_DTYPES.get(entry["dtype"], torch.uint8)
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] in _KNOWN_DTYPES and end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor of shape {list(shape)}, dtype {entry['dtype']}")
    return _Stored(dtype, shape, path, data_start + begin)


def _read_bin(path: Path) -> dict[str, _Stored]:
    """Memory-map a legacy checkpoint; torch's weights-only loader runs no code from it."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many types, all of which mean: not a weights-only zip checkpoint
        raise UserError(
            f"{path}: cannot be loaded as weights only ({error}); re-save it as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected tensors by name")
    return {
        name: _Stored(tensor.dtype, tuple(tensor.shape), path, mapped=tensor.detach())
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
