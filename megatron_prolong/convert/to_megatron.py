"""Hugging Face -> Megatron: a checkpoint directory that any layout can load."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from megatron_prolong.convert.dist_writer import write_torch_dist
from megatron_prolong.convert.dtypes import parse_dtype
from megatron_prolong.convert.hf_weights import HFWeights
from megatron_prolong.convert.manifest import manifest, write_manifest
from megatron_prolong.convert.names import megatron_tensors
from megatron_prolong.convert.sidecar import copy_sidecar
from megatron_prolong.convert.staging import staged_directory
from megatron_prolong.convert.transfer import WORKERS, RowSource, num_bytes, output_dtype
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import HF_DIR, ModelShape, no_model, read_json, stages_hint
from megatron_prolong.runtime.checksums import write_checksums


def to_megatron(
    hf_dir: Path | str, out: Path | str, dtype: str | None = None, *, workers: int = WORKERS
) -> None:
    """Convert a Hugging Face Llama directory, without a GPU and without holding the model in memory.

    Args:
        hf_dir: config.json and safetensors (or legacy .bin) weights; tokenizer files travel along.
        out: directory to make; appears only when complete.
        dtype: "bf16", "fp16" or "fp32"; as stored by default.
        workers: files written at once, each by a thread with its own chunk.

    Raises:
        UserError: not a Llama, missing or damaged files, `out` exists, disk full.
    """
    hf_dir = Path(hf_dir)
    if not hf_dir.exists():
        raise no_model(hf_dir)
    if not (hf_dir / "config.json").exists():
        hint = stages_hint(hf_dir)
        raise UserError(f"{hf_dir}: no config.json; expected a Hugging Face model directory{hint}")
    shape = ModelShape.from_hf(read_json(hf_dir / "config.json"), str(hf_dir / "config.json"))
    with contextlib.closing(HFWeights(hf_dir)) as weights:
        weights.check(shape)
        if dtype is None:
            weights.check_dtypes(shape)
        write_checkpoint(Path(out), shape, weights, parse_dtype(dtype), hf_dir, workers)


def write_checkpoint(
    out: Path,
    shape: ModelShape,
    source: RowSource,
    dtype: torch.dtype | None,
    sidecar: Path,
    workers: int = WORKERS,
) -> None:
    """Write a whole checkpoint directory: weights read from `source`, hf/ from `sidecar`, prolong.json."""
    tensors = [(tensor, output_dtype(tensor, source, dtype)) for tensor in megatron_tensors(shape)]
    with staged_directory(out, sum(num_bytes(*entry) for entry in tensors)) as partial:
        copy_sidecar(sidecar, partial / HF_DIR)
        sums = write_torch_dist(partial, tensors, source, workers)
        # The embedding stands for the model: mixed files keep norms in fp32 at most.
        write_manifest(partial, manifest(shape, tensors[0][1]))
        write_checksums(partial, sums)
