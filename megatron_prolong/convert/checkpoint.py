"""Opening a Megatron checkpoint: one of ours (prolong.json) or plain Megatron-LM's (args in its common state)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.convert.dist_weights import DistWeights
from megatron_prolong.convert.unpickle import load_common
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.rope import Llama3Scaling
from megatron_prolong.recipe.shape import (
    HF_DIR,
    MANIFEST,
    ModelShape,
    model_directory,
    read_json,
    read_manifest,
    stages_hint,
)

_ITERATION_POINTER = "latest_checkpointed_iteration.txt"
# Argument of Megatron-LM's command line, its value for a Llama, its value where an older version does not know it.
_LLAMA_ARGUMENTS: tuple[tuple[str, Any, Any], ...] = (
    ("swiglu", True, False),
    ("normalization", "RMSNorm", "LayerNorm"),
    ("position_embedding_type", "rope", "learned_absolute"),
    ("add_bias_linear", False, True),
    ("add_qkv_bias", False, False),
    ("qk_layernorm", False, False),
    ("rotary_percent", 1.0, 1.0),
    ("rotary_interleaved", False, False),
    ("num_experts", None, None),
    ("apply_layernorm_1p", False, False),
    ("layernorm_zero_centered_gamma", False, False),  # what newer versions call it
    ("multi_latent_attention", False, False),
    ("rotary_seq_len_interpolation_factor", None, None),
    # These change what is computed, not which tensors there are.
    ("window_size", None, None),
    ("no_rope_freq", None, None),
    ("qk_l2_norm", False, False),
    ("softmax_type", "vanilla", "vanilla"),
    ("use_mup", False, False),
    ("apply_residual_connection_post_layernorm", False, False),
    ("glu_linear_offset", 0, 0),
)


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint directory and what it says about itself.

    Attributes:
        shape: with the RoPE base and length it was last trained at.
        kind: "weights", "training" or "megatron-lm".
        sidecar: directory with the original's config.json and tokenizer, if any.
        about: stage, step, layout, versions and so on.
    """

    directory: Path
    shape: ModelShape
    kind: str
    sidecar: Path | None
    about: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, sidecar: Path | None = None) -> MegatronCheckpoint:
        """Read a checkpoint's description.

        Args:
            directory: ours, the stage directory of a run, or Megatron-LM's iter_… directory or the one above it.
            sidecar: Hugging Face directory with config and tokenizer to use instead of the checkpoint's own.

        Raises:
            UserError: it is neither.
        """
        directory = model_directory(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a checkpoint{stages_hint(directory)}")
        if (directory / MANIFEST).exists():
            return cls._open_ours(directory, sidecar)
        if (pointer := directory / _ITERATION_POINTER).exists():
            directory = _newest(pointer)
        if (common := load_common(directory)) is not None:
            return cls._open_megatron_lm(directory, common, sidecar)
        raise UserError(
            f"{directory}: not a Megatron torch_dist checkpoint (neither {MANIFEST} nor Megatron's common "
            "state is there)" + stages_hint(directory)
        )

    @classmethod
    def _open_ours(cls, directory: Path, sidecar: Path | None) -> MegatronCheckpoint:
        about = read_manifest(directory)
        shape = ModelShape.from_dict(about["shape"])
        if (length := about.get("sequence_length")) and length > shape.max_length:
            shape = shape.replace(max_length=length)
        own = directory / HF_DIR
        return cls(directory, shape, about["kind"], sidecar or (own if own.is_dir() else None), about)

    @classmethod
    def _open_megatron_lm(
        cls, directory: Path, common: dict[str, Any], sidecar: Path | None
    ) -> MegatronCheckpoint:
        args = common.get("args")
        if not isinstance(args, argparse.Namespace):
            raise UserError(f"{directory}: its common state holds no args, so the model's shape is unknown")
        vocab_size = None
        if sidecar is not None and (sidecar / "config.json").exists():
            vocab_size = read_json(sidecar / "config.json").get("vocab_size")
        about = {
            "step": common.get("iteration"),
            "sequence_length": getattr(args, "seq_length", None),
            "layout": {
                short: getattr(args, f"{name}_parallel_size", None)
                for short, name in (("tp", "tensor_model"), ("pp", "pipeline_model"), ("cp", "context"))
            },
        }
        return cls(
            directory, shape_from_args(args, str(directory), vocab_size), "megatron-lm", sidecar, about
        )


def _newest(pointer: Path) -> Path:
    """The directory that Megatron-LM's pointer names."""
    text = pointer.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():  # a release was converted, not trained
        raise UserError(f"{pointer}: found {text!r}; must be the number of an iteration, or release")
    directory = pointer.with_name(text if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory, but {pointer.name} names it")
    return directory


def shape_from_args(args: argparse.Namespace, where: str, vocab_size: int | None = None) -> ModelShape:
    """The shape that Megatron-LM's command line describes.

    Args:
        vocab_size: real size of the vocabulary; Megatron-LM may know only its padded one.

    Raises:
        UserError: the model is not a Llama, with every reason.
    """
    found = vars(args)
    problems = [
        f"{name} is {found.get(name, default)!r}; Llama has {wanted!r}"
        for name, wanted, default in _LLAMA_ARGUMENTS
        if found.get(name, default) != wanted
    ]
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    problems += [f"{name} is missing" for name in needed if not found.get(name)]
    vocab_size = vocab_size or found.get("vocab_size") or found.get("padded_vocab_size")
    if not vocab_size:
        problems.append("vocab_size is missing; name a Hugging Face directory with --hf")
    if problems:
        raise UserError.many(f"{where}: not a Llama that can be exported:", problems)
    heads = found["num_attention_heads"]
    scaling = None
    if found.get("use_rope_scaling"):
        # Megatron-LM fixes the other three numbers (rotary_pos_embedding.py, _apply_scaling).
        scaling = Llama3Scaling(
            factor=float(found.get("rope_scaling_factor") or 8.0),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_length=8192,
        )
    return ModelShape(
        num_layers=found["num_layers"],
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["ffn_hidden_size"],
        num_heads=heads,
        num_kv_heads=int(found["num_query_groups"]) if found.get("group_query_attention") else heads,
        head_dim=found.get("kv_channels") or found["hidden_size"] // heads,
        vocab_size=int(vocab_size or 0),
        max_length=int(found.get("max_position_embeddings") or found.get("seq_length") or 2048),
        rope_base=float(found.get("rotary_base") or 10000),
        rope_scaling=scaling,
        tie_embeddings=not found.get("untie_embeddings_and_output_weights", False),
        norm_eps=float(found.get("norm_epsilon") or found.get("layernorm_epsilon") or 1e-5),
        initializer_range=float(found.get("init_method_std") or 0.02),
    )


def open_weights(checkpoint: MegatronCheckpoint) -> DistWeights:
    """The checkpoint's tensors, checked against its shape."""
    weights = DistWeights(checkpoint.directory)
    weights.check(checkpoint.shape)
    return weights
