"""Rotary settings of a Llama, as its config.json spells them: the base, and how frequencies are scaled.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Both are read, and
both are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

RopeFound = tuple[float, "RopeScaling | None", list[str]]
"""RoPE base, scaling, and what is wrong with them."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama-3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    @property
    def attention_factor(self) -> float:
        """As YarnScaling's; it leaves the scores alone."""
        return 1.0

    def to_hf(self) -> dict[str, Any]:
        """As in config.json."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_length,
        }


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071; `rope_type: yarn`).

    Attributes:
        factor: how many times longer than the original length positions may be.
        beta_fast: pairs that turn more often than this within the original length keep their frequency.
        beta_slow: those that turn less often are slowed down by `factor`; between the two, in between.
        attention_factor: queries and keys are multiplied by it, so the scores by its square.
        truncate: round the pairs where the ramp begins and ends to whole ones.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True

    def to_hf(self) -> dict[str, Any]:
        """As in config.json; what follows from the factor, or is the default, is left out."""
        config: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_length,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        if self.attention_factor != yarn_attention_factor(self.factor):
            config["attention_factor"] = self.attention_factor
        if not self.truncate:
            config["truncate"] = False
        return config


RopeScaling = Llama3Scaling | YarnScaling


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """What the paper suggests (its equation 22): the longer the context, the sharper the attention."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaling_from_dict(fields: dict[str, Any]) -> RopeScaling:
    """From the fields of either class."""
    return YarnScaling(**fields) if "beta_fast" in fields else Llama3Scaling(**fields)


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The fields of config.json, as transformers 4 and as transformers 5 read them."""
    spelled = scaling.to_hf() if scaling else None
    return {
        "rope_theta": base,
        "rope_scaling": spelled,
        "rope_parameters": {"rope_type": "default", **(spelled or {}), "rope_theta": base},
    }


def read_rope(config: dict[str, Any]) -> RopeFound:
    """RoPE base, scaling and problems, from either spelling; from both where they agree."""
    newer, older, theta = (config.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    if not newer:
        return _read_spelling(older or {}, theta)
    base, scaling, problems = found = _read_spelling(newer, theta)
    if not problems and (theta not in (None, base) or (older and _read_spelling(older, base) != found)):
        problems = [
            "rope_parameters says something else than rope_theta and rope_scaling; delete what is wrong"
        ]
    return base, scaling, problems


_NUMBERS: dict[str, dict[str, float | None]] = {
    "default": {},
    "llama3": dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0},
}
"""By rope_type: what must be given, and what these defaults of transformers stand in for."""


def _read_spelling(rope: Any, theta: Any) -> RopeFound:
    """What one of the two mappings says; `theta` is the RoPE base where it names none."""
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return 0.0, None, [f"the rotary settings are {rope!r}; a mapping of numbers is needed"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _NUMBERS:
        return 0.0, None, [f"rope type is {kind!r}; only {', '.join(map(repr, _NUMBERS))} are supported"]
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return 0.0, None, [f"partial_rotary_factor is {share!r}; only 1.0 is supported"]
    numbers = {
        name: default if rope.get(name) is None else rope[name] for name, default in _NUMBERS[kind].items()
    }
    optional = ("attention_factor", "mscale", "mscale_all_dim") if kind == "yarn" else ()
    numbers |= {name: rope[name] for name in optional if rope.get(name) is not None}
    numbers["rope_theta"] = next(
        value for value in (rope.get("rope_theta"), theta, 10000.0) if value is not None
    )
    if wrong := [f"{name} is {value!r}" for name, value in numbers.items() if not is_positive(value)]:
        where = "" if kind == "default" else " beside rope_type"
        return 0.0, None, [f"{', '.join(wrong)}; a number above 0 is needed{where}"]
    reals = {name: float(value) for name, value in numbers.items() if value is not None}
    base = reals.pop("rope_theta")
    if kind == "default":
        return base, None, []
    length = int(reals.pop("original_max_position_embeddings"))
    if kind == "llama3":
        return base, Llama3Scaling(original_max_length=length, **reals), []
    return base, _yarn(length, bool(rope.get("truncate", True)), reals), []


def _yarn(length: int, truncate: bool, reals: dict[str, float]) -> YarnScaling:
    """With the attention factor that transformers takes (`_compute_yarn_parameters`)."""
    given, *weights = (reals.pop(name, 0.0) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if not given:
        above, below = weights if all(weights) else (1.0, 0.0)
        given = yarn_attention_factor(reals["factor"], above) / yarn_attention_factor(reals["factor"], below)
    return YarnScaling(original_max_length=length, attention_factor=given, truncate=truncate, **reals)


def is_positive(value: Any) -> bool:
    """A finite number above 0."""
    return isinstance(value, int | float) and 0 < value < math.inf
