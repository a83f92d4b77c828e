"""The English words of the synthetic tasks: those of the wonderwords package, as RULER uses."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """All words of a kind (noun, adjective or verb), in the order of the package's list."""
    text = files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(word.strip() for word in text.splitlines() if word.strip())
