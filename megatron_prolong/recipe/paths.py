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
    """Refuses two spellings of one path, of which a dict would silently keep the last."""
    paths = [expanded(Path(str(name))) for name in directories] if isinstance(directories, dict) else []
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise ValueError(f"names {twice[0]} twice; keep one")
    return directories


Directories = Annotated[dict[UserPath, Annotated[Real, Field(gt=0, le=1)]], BeforeValidator(_each_once)]
"""Directories with their proportions."""
