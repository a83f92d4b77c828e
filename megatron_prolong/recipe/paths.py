"""Paths as people write them in recipes: relative to the working directory, with ~ and $VARIABLES."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from megatron_prolong.recipe.numbers import Real


def expanded(path: Path) -> Path:
    """`path` with ~ and $VARIABLES replaced; an unknown user or variable stays as written."""
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111 - Path's fails on an unknown ~user


UserPath = Annotated[Path, AfterValidator(expanded)]


def _each_once(directories: object) -> object:
    """Refuses two names of one directory: what is in it would be drawn twice as often as told."""
    names = [str(name) for name in directories] if isinstance(directories, dict) else []
    places = [expanded(Path(name)).resolve() for name in names]
    if twice := [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"names one directory twice: {' and '.join(twice)}; keep one")
    return directories


Directories = Annotated[dict[UserPath, Annotated[Real, Field(gt=0, le=1)]], BeforeValidator(_each_once)]
"""Directories with their proportions."""
