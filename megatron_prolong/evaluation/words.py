"""What synthetic tasks hide: English words (of the wonderwords package, as RULER uses them), numbers, UUIDs."""

from __future__ import annotations

import random
import uuid
from functools import cache
from importlib.resources import files


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """All words of a kind (noun, adjective or verb), in the order of the package's list."""
    text = files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(word.strip() for word in text.splitlines() if word.strip())


def random_words(rng: random.Random) -> str:
    """adjective-noun."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def random_number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
