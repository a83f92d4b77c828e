"""Megatron -> Hugging Face: safetensors, config and tokenizer that transformers and vLLM load unchanged."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_prolong.convert.checkpoint import MegatronCheckpoint, open_weights
from megatron_prolong.convert.dtypes import dtype_name, parse_dtype
from megatron_prolong.convert.hf_writer import write_safetensors
from megatron_prolong.convert.names import hf_tensors
from megatron_prolong.convert.sidecar import (
    check_sidecar,
    config_changes,
    copy_sidecar,
    exported_config,
    raise_limits,
    write_config,
    write_tokenizers_config,
)
from megatron_prolong.convert.staging import staged_directory
from megatron_prolong.convert.transfer import WORKERS, num_bytes, output_dtype
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.rope import is_positive
from megatron_prolong.recipe.shape import HF_DIR, ModelShape, read_json


def to_hf(
    checkpoint: Path | str,
    out: Path | str,
    rope_base: float | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    *,
    contradict: bool = False,
    sidecar: Path | None = None,
    workers: int = WORKERS,
) -> list[str]:
    """Export a checkpoint of ours, or a plain Megatron-LM torch_dist checkpoint of a Llama.

    Args:
        checkpoint: the directory, or a stage directory of a run (its newest checkpoint); saved at any layout.
        out: directory to make; appears only when complete.
        rope_base: RoPE base to write; by default the one the checkpoint was trained with.
        max_length: max_position_embeddings to write, in tokens; by default the checkpoint's.
        dtype: "bf16", "fp16" or "fp32"; as stored by default.
        contradict: write `rope_base` and `max_length` even where they differ from what was trained.
        sidecar: Hugging Face directory to take tokenizer and, where it has one, config from, instead of the
            checkpoint's hf/.
        workers: shards written at once, each by a thread with its own chunk.

    Returns:
        What changed in config.json and in the limits of tokenizer and generation against the source's, one line
        per field.

    Raises:
        UserError: not such a checkpoint, damaged files, contradiction, `out` exists, disk full.
    """
    if sidecar is not None:
        check_sidecar(sidecar)
    opened = MegatronCheckpoint.open(Path(checkpoint), sidecar)
    shape = _exported_shape(opened, rope_base, max_length, contradict)
    target_dtype = parse_dtype(dtype)
    with contextlib.closing(open_weights(opened)) as weights:
        tensors = [(tensor, output_dtype(tensor, weights, target_dtype)) for tensor in hf_tensors(shape)]
        with staged_directory(Path(out), sum(num_bytes(*entry) for entry in tensors)) as partial:
            changes = _write_sidecar(partial, opened, shape, dtype_name(tensors[0][1]))
            write_safetensors(partial, tensors, weights, workers)
    return changes


def _exported_shape(
    checkpoint: MegatronCheckpoint, rope_base: float | None, max_length: int | None, contradict: bool
) -> ModelShape:
    """The checkpoint's shape with the asked RoPE base and length, if they agree with what was trained."""
    trained = checkpoint.shape
    if rope_base is not None and not is_positive(rope_base):
        raise UserError(f"{rope_base:g} is no RoPE base; a number above 0 is needed")
    problems = []
    if rope_base is not None and rope_base != trained.rope_base:
        problems.append(
            f"rope base {rope_base:g} was asked for, but the weights were trained with {trained.rope_base:g}"
        )
    if max_length is not None and max_length > trained.max_length:
        problems.append(
            f"max length {max_length} was asked for, but the weights are for at most {trained.max_length}"
        )
    if problems and not contradict:
        raise UserError.many(
            f"{checkpoint.directory}: contradicts its training (--contradict exports it anyway):",
            problems,
        )
    return trained.replace(
        rope_base=rope_base or trained.rope_base, max_length=max_length or trained.max_length
    )


def _write_sidecar(
    directory: Path, checkpoint: MegatronCheckpoint, shape: ModelShape, dtype: str
) -> list[str]:
    """config.json, generation config, tokenizer; returns what differs from the source's.

    Where the sidecar is a tokenizer alone, the checkpoint's own configs are the source; where there are none, the
    tokenizer says at which tokens a text begins and ends.
    """
    source = None
    if (tokenizer := checkpoint.sidecar) is not None:
        models = (tokenizer, checkpoint.directory / HF_DIR)
        model = next((path for path in models if (path / "config.json").exists()), tokenizer)
        copy_sidecar(model, directory, tokenizer)
        if (directory / "config.json").exists():
            source = read_json(directory / "config.json")
    config = exported_config(shape, source, dtype)
    changes = []
    if source is None:
        write_tokenizers_config(directory, config)
    else:
        write_config(directory, config)
        changes = config_changes(source, config)
    return [f"config.json: {line}" for line in changes] + raise_limits(directory, shape.max_length)
