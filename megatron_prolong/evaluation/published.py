"""Published scores by suite, length and model (published.yaml)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml

Scores = dict[str, dict[str, float]]
"""model → category (or task) → score, 0 to 100."""


def published(suite: str, length: int) -> Scores:
    """What the paper reports at this length; empty when nothing."""
    return _all().get(suite, {}).get(length, {})


@cache
def _all() -> dict[str, dict[int, Scores]]:
    text = files("megatron_prolong.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
