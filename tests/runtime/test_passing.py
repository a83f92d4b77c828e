"""What passes by itself is tried again, and ends a command with 1; what does not is told at once, and with 2."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_prolong.errors import JointError, PassingError, UserError
from megatron_prolong.runtime.agreement import together
from megatron_prolong.runtime.passing import WAITS_SECONDS, exit_code, patiently

STALE = OSError(errno.ESTALE, "Stale file handle", "/data/shard")
GONE = FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/shard")


def raised(error: Exception, cause: Exception | None, *, severed: bool = False) -> Exception:
    """`error`, as it is after it was raised where `cause` was handled."""
    try:
        try:
            raise cause or error
        except OSError:
            if severed:
                raise error from None
            raise error  # noqa: B904 - the context must be enough
    except Exception as found:
        return found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (STALE, 1),
        (GONE, 2),
        (UserError("bad"), 2),
        (PassingError("full"), 1),
        (raised(UserError("cannot be read"), STALE), 1),
        (raised(UserError("cannot be read"), GONE), 2),
        (raised(UserError("in use"), BlockingIOError(errno.EAGAIN, "locked"), severed=True), 2),
    ],
)
def test_a_fault_that_passes_ends_with_1_whatever_was_made_of_it(error: UserError, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(("error", "code"), [(STALE, 1), (GONE, 2)])
def test_so_it_does_where_all_ranks_end_with_it(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def action() -> None:
        raise error

    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda found, own, _: found.__setitem__(slice(None), [own, (None, 2)])
    )
    with pytest.raises(JointError, match=r"^/data/shard: ") as refused:
        together(action)
    assert refused.value.exit_code == code


def outcomes(*found: Exception | str) -> Iterator[Exception | str]:
    return iter(found)


def attempt(left: Iterator[Exception | str]) -> str:
    found = next(left)
    if isinstance(found, Exception):
        raise found
    return found


def test_it_is_tried_again_after_longer_and_longer_waits(capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    torn = raised(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.EIO, "Input/output error"))
    left = outcomes(STALE, torn, STALE, "read")
    assert patiently(lambda: attempt(left), "reading", waited.append) == "read"
    assert waited == [*WAITS_SECONDS] == sorted(waited)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].startswith("warning: ") and said[0].endswith(
        ": reading: [Errno 116] Stale file handle: '/data/shard'; trying again in 5 s"
    )


@pytest.mark.parametrize(
    ("found", "tries"),
    [([STALE] * (len(WAITS_SECONDS) + 1), len(WAITS_SECONDS) + 1), ([STALE, GONE], 2), ([GONE], 1)],
)
def test_what_does_not_pass_is_raised(found: list[Exception], tries: int) -> None:
    left = outcomes(*found, "never asked")
    waited: list[float] = []
    with pytest.raises(type(found[-1])) as refused:
        patiently(lambda: attempt(left), "reading", waited.append)
    assert refused.value is found[-1] and len(waited) == tries - 1 and next(left) == "never asked"
