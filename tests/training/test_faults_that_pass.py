"""A fault of the file server on one rank, which passes or stays, and what becomes of the training of all."""

from __future__ import annotations

import pytest

STALE = """
import errno, os
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer
from megatron_prolong.cli import main
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.mcore.checkpoint import Snapshot
from megatron_prolong.runtime import passing

passing.WAITS_SECONDS = (0.1, 0.1, 0.1)

def fails_at_first(function, count):
    def once(*arguments):
        nonlocal count
        if os.environ["RANK"] == "{rank}" and count:
            count -= 1
            raise OSError(errno.ESTALE, "Stale file handle", "/the/file")
        return function(*arguments)
    return once

{owner} = fails_at_first({owner}, {count})
main.run()
"""
PLACES = [("Mixture.read", 1), ("Snapshot.write", 1), ("Writer.finish", 0)]


@pytest.mark.parametrize(("owner", "rank"), PLACES)
def test_one_that_passes_costs_nothing(workspace, undisturbed, owner, rank) -> None:
    run = f"passes-{owner}"
    program = ["-c", STALE.format(owner=owner, rank=rank, count=3)]
    ranks = workspace.start_ranks(run, program=program)
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [text.count("Stale file handle") for text in said] == ([0, 3] if rank else [3, 0])
    assert workspace.losses(run) == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.parametrize(("owner", "rank"), PLACES)
def test_one_that_stays_ends_all_ranks_with_1(workspace, owner, rank) -> None:
    """After which a batch job goes back into the queue."""
    ranks = workspace.start_ranks(
        f"stays-{owner}", program=["-c", STALE.format(owner=owner, rank=rank, count=-1)]
    )
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    if owner == "Snapshot.write":
        assert "step_00000003 could not be saved:\n  - rank 1: OSError: [Errno 116] Stale" in said[0]
        assert "error" not in said[1]
