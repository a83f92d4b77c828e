"""Megatron's tensors are read whatever their chunks are, and under the names of either layer spec."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.errors import UserError

_LAYERS = "decoder.layers."
_NATIVE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def _assert_exported(converted: Path, original: Path) -> None:
    to_hf(converted, converted.with_name("exported"))
    expected, found = (
        load_file(directory / "model.safetensors")
        for directory in (original, converted.with_name("exported"))
    )
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_layers_under_names_of_their_own(original: Path, converted: Path) -> None:
    """As a layer spec saves them whose layers differ, and the one without Transformer Engine names the norms."""
    contents = pickle.loads((converted / ".metadata").read_bytes())
    tensors = contents.state_dict_metadata
    for key in [key for key in tensors if key.startswith(_LAYERS) and key.endswith("weight")]:
        stacked = tensors.pop(key)
        name = key.removeprefix(_LAYERS)
        for chunk in stacked.chunks:
            layer, *start = chunk.offsets
            own = f"{_LAYERS}{layer}.{_NATIVE.get(name, name)}"
            entry = tensors.setdefault(
                own, dataclasses.replace(stacked, size=torch.Size(stacked.size[1:]), chunks=[])
            )
            entry.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(chunk.sizes[1:])))
            place = contents.storage_data.pop(MetadataIndex(key, chunk.offsets))
            contents.storage_data[MetadataIndex(own, torch.Size(start))] = place
    (converted / ".metadata").write_bytes(pickle.dumps(contents))
    _assert_exported(converted, original)


def test_chunks_of_rows_and_columns(original: Path, converted: Path) -> None:
    """As tensor-parallel ranks save them, two layers in one chunk, as a pipeline stage does."""
    key = f"{_LAYERS}self_attention.linear_proj.weight"
    contents = pickle.loads((converted / ".metadata").read_bytes())
    weights = load_file(original / "model.safetensors")
    whole = torch.stack([weights[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in range(4)])
    entry = contents.state_dict_metadata[key]
    entry.chunks.clear()
    with (converted / "__1_0.distcp").open("wb") as file:
        for layers in ((0, 2), (2, 4)):
            for rows in ((0, 24), (24, 64)):
                for columns in ((0, 40), (40, 64)):
                    spans = (layers, rows, columns)
                    offsets = torch.Size([start for start, _ in spans])
                    sizes = torch.Size([stop - start for start, stop in spans])
                    place = file.tell()
                    torch.save(whole[tuple(slice(*span) for span in spans)].clone(), file)
                    info = _StorageInfo("__1_0.distcp", place, file.tell() - place)
                    contents.storage_data[MetadataIndex(key, offsets)] = info
                    entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
    (converted / ".metadata").write_bytes(pickle.dumps(contents))
    _assert_exported(converted, original)
    entry.chunks.pop()
    (converted / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match=r"linear_proj\.weight has chunks that overlap or are missing"):
        to_hf(converted, converted.with_name("again"))
