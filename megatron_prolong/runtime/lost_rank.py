"""A rank that dies makes the others fail at once, with one sentence instead of the backend's stack trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_prolong.errors import RankLost

# Gloo reports a lost connection as a plain RuntimeError with one of these; NCCL's errors are dist.DistError.
_GLOO_SAYS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


@contextmanager
def naming_lost_ranks(rank: int, where: Callable[[], str]) -> Iterator[None]:
    """Turn what the backend raises when another rank is gone into a RankLost that says where it was noticed.

    Args:
        rank: this rank, which noticed.
        where: called when it happens, e.g. "step 12 of stage 64k".

    Raises:
        RankLost: the backend lost a connection or waited in vain.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and not any(text in said for text in _GLOO_SAYS):
            raise
        raise RankLost(
            f"rank {rank} lost another rank in {where()}; the first rank that failed, named by the launcher or "
            "in its own log, is the cause. The same command goes on from the newest checkpoint. "
            f"(The backend said: {said.splitlines()[0]})"
        ) from error
