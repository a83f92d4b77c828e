"""The shape of a Llama: what its config.json says, in one frozen dataclass.

Everything that needs to know the model (planner, conversion, Megatron, export) reads this and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.rope import RopeScaling, is_positive, read_rope, scaling_from_dict, write_rope
from megatron_prolong.recipe.run_files import LATEST

MANIFEST = "prolong.json"
"""What a checkpoint of ours says about itself; its absence tells a Hugging Face directory."""
HF_DIR = "hf"
"""Where a checkpoint of ours keeps the tokenizer and configs of the model it came from."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns of the files of a Hugging Face directory that say how text becomes tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a Llama but its weights. Sizes are in elements, lengths in tokens."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    rope_base: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> ModelShape:
        """The shape that a Hugging Face config.json describes; `where` names the file in messages.

        Raises:
            UserError: the model is not a plain Llama, with every reason.
        """
        problems = [*_not_llama(config), *_wrong_numbers(config)]
        rope_base, rope_scaling, rope_problems = read_rope(config)
        problems += rope_problems
        if problems:
            raise UserError.many(
                f"{where} does not describe a Llama model that can be trained here:", problems
            )
        num_heads = int(config["num_attention_heads"])
        return cls(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
            vocab_size=int(config["vocab_size"]),
            max_length=int(config.get("max_position_embeddings") or 2048),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            initializer_range=float(config.get("initializer_range") or 0.02),
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelShape:
        """The inverse of `to_dict`, as stored in a checkpoint's prolong.json."""
        scaling = fields.get("rope_scaling")
        return cls(**{**fields, "rope_scaling": scaling_from_dict(scaling) if scaling else None})

    @property
    def softmax_scale(self) -> float | None:
        """What scores are multiplied by, where it is not 1 / √head_dim: YaRN sharpens attention."""
        factor = self.rope_scaling.attention_factor if self.rope_scaling else 1.0
        return None if factor == 1.0 else factor**2 / math.sqrt(self.head_dim)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with some fields changed, e.g. `shape.replace(rope_base=8e6)`."""
        return dataclasses.replace(self, **changes)


def model_directory(path: Path | str) -> Path:
    """The directory a model's path means: a run's stage directory stands for its newest checkpoint.

    Training writes RUN/STAGE/latest, a file that names the newest of RUN/STAGE/step_*. A file of that name inside a
    model is another program's: DeepSpeed's, which names its own state.
    """
    path = Path(path)
    pointer = path if path.name == LATEST else path / LATEST
    is_model = any((path / name).exists() for name in (MANIFEST, "config.json"))
    if pointer.is_file() and not is_model:
        return pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    return path


def stages_hint(directory: Path) -> str:
    """What an error adds when somebody gives a run, a stage that it does not have, or a model's place in the Hub's
    cache, instead of a checkpoint."""
    snapshots = [str(config.parent) for config in sorted(directory.glob("snapshots/*/config.json"))]
    if snapshots:
        return f"; this is the Hub's cache of a model, give a snapshot of it: {', '.join(snapshots)}"
    run, subject = (directory, "this") if directory.is_dir() else (directory.parent, directory.parent)
    stages = ", ".join(str(pointer.parent) for pointer in sorted(run.glob(f"*/{LATEST}")))
    return f"; {subject} is a run, give one of its stages: {stages}" if stages else ""


def no_model(directory: Path) -> UserError:
    """For a path where nothing is: most often a mistyped stage, or the name of a model on the Hub."""
    hint = stages_hint(directory)
    if len(directory.parts) == 2 and not directory.parent.exists():
        hint = (
            " (relative to the working directory; of the Hub, fetch it first: "
            "hf download NAME --local-dir DIRECTORY)"
        )
    return UserError(f"{directory}: no such directory; expected a Hugging Face model or a checkpoint{hint}")


def read_shape(path: Path | str) -> ModelShape:
    """The shape of a model: a Hugging Face directory (config.json), a checkpoint of ours (prolong.json), or
    the stage directory of a run.

    Raises:
        UserError: there is no such directory, neither file is in it, or the file is not readable as such.
    """
    directory = model_directory(path)
    if not directory.is_dir():
        raise no_model(directory)
    if (directory / MANIFEST).exists():
        return ModelShape.from_dict(read_manifest(directory)["shape"])
    if (theirs := directory / "config.json").exists():
        return ModelShape.from_hf(read_json(theirs), str(theirs))
    raise UserError(
        f"{directory}: holds neither config.json (Hugging Face) nor {MANIFEST} (checkpoint)"
        + stages_hint(directory)
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a checkpoint of ours says about itself.

    Raises:
        UserError: there is no such file, or it is not one that this version can read.
    """
    path = directory / MANIFEST
    content = read_json(path)
    if content.get("format") != 1:
        raise UserError(f"{path}: format {content.get('format')!r}; this version reads format 1")
    try:
        shape = ModelShape.from_dict(content["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint description this version can read ({error!r})") from error
    if missing := [name for name in ("kind", "step") if name not in content]:
        raise UserError(f"{path}: does not say {' and '.join(missing)}: not a checkpoint's description")
    wrong = [*_wrong_fields(shape), *(_wrong_fields(shape.rope_scaling) if shape.rope_scaling else [])]
    wrong += [
        f"{name} is {content[name]!r}"
        for name in ("step", "sequence_length")
        if not isinstance(content.get(name), int | None)
    ]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}: not the kind of number that belongs there; correct it")
    return content


def _wrong_fields(record: ModelShape | RopeScaling) -> list[str]:
    """Fields whose values are of another type than theirs, or no positive number, as after an edit by hand."""
    is_right: dict[Any, Callable[[Any], bool]] = {
        "int": lambda value: type(value) is int and value > 0,
        "float": lambda value: type(value) is not bool and is_positive(value),
        "bool": lambda value: type(value) is bool,
    }
    values = {field.name: (field.type, getattr(record, field.name)) for field in dataclasses.fields(record)}
    return [
        f"{name} is {value!r}"
        for name, (kind, value) in values.items()
        if kind in is_right and not is_right[kind](value)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def to_hf_config(shape: ModelShape, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json for `shape`; whatever else `source` (the original config) says is kept."""
    config: dict[str, Any] = dict(
        source or {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "bfloat16"}
    )
    config.update(
        model_type="llama",
        attention_bias=False,
        mlp_bias=False,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=shape.tie_embeddings,
        rms_norm_eps=shape.norm_eps,
        initializer_range=shape.initializer_range,
        **write_rope(shape.rope_base, shape.rope_scaling),
    )
    return config


def _not_llama(config: dict[str, Any]) -> list[str]:
    """Every way in which the config leaves plain Llama."""
    rules: list[tuple[str, Any, Any]] = [
        ("model_type", "llama", config.get("model_type")),
        ("hidden_act", "silu", config.get("hidden_act", "silu")),
        ("attention_bias", False, bool(config.get("attention_bias", False))),
        ("mlp_bias", False, bool(config.get("mlp_bias", False))),
        ("partial_rotary_factor", 1.0, config.get("partial_rotary_factor") or 1.0),
    ]
    problems = [
        f"{key} is {found!r}; only {wanted!r} is supported" for key, wanted, found in rules if found != wanted
    ]
    if config.get("quantization_config"):
        problems.append("quantization_config is set; give the unquantised weights")
    return problems


_COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_OPTIONAL_REALS = ("rms_norm_eps", "initializer_range")


def _wrong_numbers(config: dict[str, Any]) -> list[str]:
    """Every size that is missing or impossible; null is as good as absent where there is a default."""
    counts = [*_COUNTS, *(name for name in _OPTIONAL_COUNTS if config.get(name) is not None)]
    reals = [name for name in _OPTIONAL_REALS if config.get(name) is not None]
    wrong = [
        f"{name} is {config.get(name)!r}; a positive whole number is needed"
        for name in counts
        if not is_positive(config.get(name)) or config[name] % 1
    ]
    if not wrong and (heads := config["num_attention_heads"]) % (config.get("num_key_value_heads") or heads):
        wrong.append(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {config['num_key_value_heads']}"
        )
    return wrong + [
        f"{name} is {config[name]!r}; a number above 0 is needed"
        for name in reals
        if not is_positive(config[name])
    ]
