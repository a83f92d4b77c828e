"""Run a function in several gloo ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """Call the module-level `function(*args)` on `size` ranks."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, (size, str(Path(directory) / "store"), function, args), nprocs=size)


def _rank(rank: int, size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    function(*args)
    dist.destroy_process_group()
