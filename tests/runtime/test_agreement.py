"""What ranks agree on: one value, who acts, and the same error on all of them whoever met it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_prolong.errors import JointError, PassingError, UserError
from megatron_prolong.runtime.agreement import against_main, from_main, on_main, together

GONE = FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone")


def _refusal(act: Callable[[], object]) -> tuple[str, bool, int]:
    with pytest.raises(JointError) as refused:
        act()
    return str(refused.value), refused.value.said_here, refused.value.exit_code


def _raising(error: Exception | None) -> Callable[[], None]:
    def action() -> None:
        if error is not None:
            raise error

    return action


def _refused(rank: int, *errors: Exception | None) -> tuple[str, bool, int]:
    """What a rank tells where each meets its own of these errors."""
    return _refusal(lambda: together(_raising(errors[rank])))


def _as_one_of_three(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )
    main = rank == 0
    assert together(lambda: rank) == rank and from_main(rank) == 0
    assert on_main(lambda: rank) == (0 if main else None)
    same = UserError("bad")
    assert _refused(rank, None, same, same) == ("rank 1: bad", main, 2)
    assert _refused(rank, same, None, PassingError("full")) == ("bad\nrank 2: full", main, 2)
    assert _refused(rank, None, PassingError("full"), None) == ("rank 1: full", main, 1)
    assert _refused(rank, None, None, GONE) == ("rank 2: /gone: No such file or directory", main, 2)
    for bug in (ValueError("ours"), OSError(errno.EPIPE, "of no file")):
        with pytest.raises(type(bug)):  # with its traceback
            together(_raising(bug))

    def compare(theirs: int, own: int) -> None:
        if own > theirs + 1:
            raise UserError(f"{own}, but {theirs} on rank 0")

    assert _refusal(lambda: against_main(rank, compare)) == ("rank 2: 2, but 0 on rank 0", main, 2)
    pair = dist.new_group([0, 1])
    if rank < 2:
        assert together(lambda: rank, pair) == rank
        assert on_main(lambda: "acts", pair) == ("acts" if main else None)
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    torch.multiprocessing.spawn(_as_one_of_three, (str(tmp_path / "store"),), nprocs=3)
