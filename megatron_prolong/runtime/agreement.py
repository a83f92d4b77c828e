"""A user error on one rank ends the job on all of them, with one message and nobody left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_prolong.errors import JointError, UserError
from megatron_prolong.runtime.passing import exit_code

T = TypeVar("T")


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on every rank of the default process group, or of a CPU `group`. Collective.

    Raises:
        JointError: on every rank, with all that went wrong anywhere.
    """
    result, problem, own_code = None, None, UserError.exit_code
    try:
        result = action()
    except UserError as error:
        problem, own_code = str(error), exit_code(error)
    except OSError as error:
        if error.filename is None:
            raise
        problem, own_code = f"{error.filename}: {error.strerror}", exit_code(error)
    problems: list[tuple[str | None, int]] = [(None, 0)] * dist.get_world_size(group)
    dist.all_gather_object(problems, (problem, own_code), group)
    first: dict[str, int] = {}
    for rank, (text, _) in enumerate(problems):
        if text is not None:
            first.setdefault(text, rank)
    if first:
        message = "\n".join(f"rank {rank}: {text}" if rank else text for text, rank in first.items())
        code = max(code for text, code in problems if text is not None)
        raise JointError(message, said_here=dist.get_rank() == 0, exit_code=code)
    return result  # type: ignore[return-value]


def from_main(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def against_main(own: T, compare: Callable[[T, T], None]) -> None:
    """Call `compare` with rank 0's value and this rank's own; what it refuses, all ranks do. Collective.

    Raises:
        JointError: on every rank, with all that was refused anywhere.
    """
    main = from_main(own)
    together(lambda: compare(main, own))


def on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """`together`, but only rank 0 acts; the others wait for it and get None. Collective."""
    return together(lambda: action() if dist.get_rank() == 0 else None, group)
