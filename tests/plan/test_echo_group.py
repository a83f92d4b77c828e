"""The group that stands for the other ranks when one is timed (benchmarks/gpu): all send what this rank sends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import echo_group

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # names that newer PyTorch calls deprecated


@pytest.fixture
def pair() -> Iterator[dist.ProcessGroup]:
    """Ranks 0 and 1 of 4, seen from rank 1."""
    echo_group.join(1, 4)
    yield dist.new_group([0, 1])
    dist.destroy_process_group()


def test_every_rank_sends_what_this_one_sends(pair):
    assert (dist.get_world_size(), dist.get_world_size(pair), dist.get_rank(pair)) == (4, 2, 1)
    mine, both = torch.arange(4.0), torch.zeros(8)
    dist.all_gather_into_tensor(both, mine, group=pair)
    assert both.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    half = torch.zeros(2)
    dist.reduce_scatter_tensor(half, mine, group=pair)
    assert half.tolist() == [4, 6]
    exchanged = torch.zeros(4)
    dist.all_to_all_single(exchanged, mine, group=pair)
    assert exchanged.tolist() == [2, 3, 2, 3]
    dist.all_reduce(mine)
    assert mine.tolist() == [0, 4, 8, 12]
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    assert mine.tolist() == [0, 4, 8, 12]


def test_what_is_received_is_what_was_sent_in_either_order(pair):
    sent, received = torch.arange(3.0), [torch.zeros(3), torch.zeros(3)]
    for first, arriving in zip((dist.isend, dist.irecv), received, strict=True):
        operations = [dist.P2POp(dist.isend, sent, group=pair, group_peer=0)]
        operations.append(dist.P2POp(dist.irecv, arriving, group=pair, group_peer=0))
        if first is dist.irecv:
            operations.reverse()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    assert [arriving.tolist() for arriving in received] == [[0, 1, 2]] * 2
