"""The end of a layout's process groups, which NCCL's ranks must reach together and gloo's need not."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_prolong.recipe.schema import Layout


def ended(rank: int, fails_on: int | None) -> list[int]:
    """The numbers, in the order of making, of the groups that `rank` destroys behind a layout."""
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.runtime.replace import replaced

    numbers: list[int] = []
    destroy = dist.destroy_process_group

    def noted(group: dist.ProcessGroup) -> None:
        numbers.append(int(group.group_name))
        destroy(group)

    with replaced([(dist, "destroy_process_group", noted)]):
        try:
            with megatron(Layout(), seed=1):
                if rank == fails_on:
                    raise MemoryError
        except MemoryError:
            pass
    return numbers


def test_ranks_end_their_groups_in_one_order(four_ranks):
    for numbers in four_ranks.run(ended, None):
        assert len(numbers) > 5 and numbers == sorted(set(numbers), reverse=True)


def test_a_rank_that_fails_alone_waits_for_none(two_ranks):
    alone, _ = two_ranks.run(ended, 0)
    assert alone == []


@pytest.mark.parametrize("fails_on", [None, 0])
def test_a_single_rank_ends_them_in_any_case(one_rank, fails_on):
    assert one_rank.run(ended, fails_on)[0]
