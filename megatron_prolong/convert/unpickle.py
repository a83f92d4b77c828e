"""Reading pickles without running anything: classes outside a short list become inert stand-ins.

Megatron's checkpoints hold pickles: `.metadata` (torch.distributed.checkpoint's table of contents),
`common.pt` (Megatron-LM's args Namespace among others) and one small pickle per tensor. They may come from
anyone, so nothing is imported or called but the plain data classes listed here.
"""

from __future__ import annotations

import argparse
import collections
import io
import math
import pickle
import zipfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_prolong.errors import UserError

_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)


def _member(kind: Any, name: str) -> Any:
    """An enum's member, as Python 3.11.2 (Debian 12) pickles it: getattr(the enum, its name)."""
    return kind[name] if kind is metadata._MEM_FORMAT_ENCODING else Inert(kind, name)


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _METADATA_CLASSES},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    # Looks a name like torch.strided up in a table, nothing more.
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _member,
}
COMMON_STATE = "common_state/shard_0_1"
"""Megatron's ShardedObject("common_state", …).unique_key: where 0.19 keeps the plain values of a checkpoint."""


class Inert:
    """Stands for an object of a class that is not on the list. Takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """What pickle calls on lists, sets and dicts."""

    append = extend = add = update = __setitem__ = _ignore


class SafeUnpickler(pickle.Unpickler):
    """pickle.Unpickler that can only build plain containers and the classes above."""

    def find_class(self, module: str, name: str) -> Any:
        """The class on the list, a torch dtype, or an inert stand-in of that name."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return type(name, (Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        """Storages of tensors are not read: only their description is kept."""
        return Inert(pid)


def load_metadata(path: Path) -> metadata.Metadata:
    """The table of contents of a torch.distributed.checkpoint directory.

    Raises:
        UserError: the file is missing, truncated or something else.
    """
    try:
        with path.open("rb") as file:
            content = SafeUnpickler(file).load()
        if isinstance(content, metadata.Metadata):
            _look_up_all(content)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: damaged, cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, metadata.Metadata):
        raise UserError(f"{path}: not the metadata of a torch.distributed.checkpoint directory")
    return content


def _look_up_all(content: metadata.Metadata) -> None:
    """Raises what it may where a changed byte took a field, or a chunk's place, away: whoever needs it later would
    not know that the file is damaged."""
    for key, entry in content.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            attrgetter("size", "properties.dtype")(entry)
            for chunk in entry.chunks:
                place = content.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
                math.prod(chunk.sizes)
                attrgetter("offset", "length")(place)
                Path(place.relative_path)


def load_common(directory: Path) -> dict[str, Any] | None:
    """The plain values that Megatron keeps beside the tensors; tensors and unknown classes are inert stand-ins.

    They are common.pt; newer versions save them as one more object in the tensors' files. None where neither is.

    Raises:
        UserError: the file is truncated or holds no dict.
    """
    path, offset, length = directory / "common.pt", 0, -1
    if not path.exists():
        table = directory / ".metadata"
        key = metadata.MetadataIndex(COMMON_STATE)
        info = load_metadata(table).storage_data.get(key) if table.exists() else None
        if info is None:
            return None
        path, offset, length = directory / info.relative_path, info.offset, info.length
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with zipfile.ZipFile(io.BytesIO(file.read(length))) as archive:
                content = SafeUnpickler(archive.open(saved_entries(archive)["data.pkl"])).load()
        if path.name != "common.pt":  # objects lie in a list
            (content,) = content
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: damaged, cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dict, found {type(content).__name__}")
    return content


def saved_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """What torch.save wrote, by name without the directory that it names after the file."""
    return {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
