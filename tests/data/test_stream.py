import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packs import numbered_packs, write_packs

from megatron_prolong.data.mds import reader
from megatron_prolong.data.mixture import Mixture, SampleRef
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.data.stream import stream
from megatron_prolong.errors import PassingError, UserError
from megatron_prolong.runtime import passing


def open_mixture(directory: Path) -> Mixture:
    return Mixture({directory: 1.0}, sequence_length=8, batch_sequences=4, seed=7, num_steps=6)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("first_step", [0, 4])
def test_it_delivers_what_the_mixture_says(tmp_path: Path, first_step: int) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    got = [
        (step, [packed.identity.index for packed in sequences])
        for step, sequences in stream(mixture, first_step, list)
    ]
    assert got == [(step, [ref.index for ref in mixture.batch(step)]) for step in range(first_step, 6)]
    assert not readers()


def test_it_reads_ahead_but_not_far(tmp_path: Path) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    third_read = threading.Event()
    asked: list[SampleRef] = []
    read = mixture.read

    def spy(ref: SampleRef) -> PackedSequence:
        assert threading.current_thread().name.startswith("read-ahead")
        asked.append(ref)
        if len(asked) == 12:
            third_read.set()
        return read(ref)

    mixture.read = spy  # type: ignore[method-assign]
    batches = stream(mixture, 0, list)
    next(batches)
    assert third_read.wait(10), "two steps are read while the first is trained on"
    time.sleep(0.2)  # a third step ahead would be read now
    assert len(asked) == 12
    batches.close()
    assert len(asked) == 12 and not readers()


def test_a_bad_sample_is_raised_at_its_step(tmp_path: Path) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", [*numbered_packs(22), [[1] * 9], *numbered_packs(1)]))
    bad_step = next(step for step in range(6) if 22 in [ref.index for ref in mixture.batch(step)])
    assert bad_step > 0
    seen = []
    with pytest.raises(UserError, match="sample 22: 9 tokens"):
        for step, _ in stream(mixture, 0, list):
            seen.append(step)
    assert seen == list(range(bad_step))
    assert not readers()


def test_batches_are_prepared_ahead_too(tmp_path: Path) -> None:
    """Training waits for nothing between two steps. What cannot be prepared is told at its step."""
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    calls = []

    def prepare(sequences: list[PackedSequence]) -> int:
        assert threading.current_thread().name.startswith("read-ahead")
        calls.append(sum(packed.identity.index for packed in sequences))
        if len(calls) == 3:
            raise UserError("a document is too long")
        return calls[-1]

    got = []
    with pytest.raises(UserError, match="too long"):
        for step, total in stream(mixture, 0, prepare):
            got.append((step, total))
    assert got == [(step, sum(ref.index for ref in mixture.batch(step))) for step in range(2)]
    assert not readers()


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    for _ in stream(mixture, 0, list):
        break
    assert not readers()


STALE = OSError(errno.ESTALE, "Stale file handle", "/data/shard.00000.mds")


class Faults:
    """In place of a function: fails so many times, and then is that function."""

    def __init__(self, function: Callable[..., Any], count: int, error: OSError = STALE) -> None:
        self.function, self.left, self.error = function, count, error

    def __call__(self, *arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            raise self.error
        return self.function(*arguments)


@pytest.mark.parametrize("count", [3, 4])
def test_a_fault_of_the_file_server_is_waited_out(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One rank's stale file handle ended the training of all."""
    monkeypatch.setattr(passing, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    batches = stream(mixture, 2, list)
    expected = [ref.index for ref in mixture.batch(2)]
    monkeypatch.setattr(mixture, "read", Faults(mixture.read, count))
    if count == 4:
        with pytest.raises(OSError, match="Stale file handle"):
            next(batches)
    else:
        assert [packed.identity.index for packed in next(batches)[1]] == expected
        batches.close()
    assert capfd.readouterr().err.count(": reading the data of step 3: [Errno 116] Stale file handle") == 3
    assert not readers()


def test_nobody_waits_for_a_fault_to_pass_when_training_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "WAITS_SECONDS", (600.0,))
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    read = mixture.read
    asked: list[SampleRef] = []
    failed = threading.Event()

    def read_step_0(ref: SampleRef) -> PackedSequence:
        asked.append(ref)
        if len(asked) > 4:
            failed.set()
            raise STALE
        return read(ref)

    monkeypatch.setattr(mixture, "read", read_step_0)
    batches = stream(mixture, 0, list)
    next(batches)
    assert failed.wait(10)
    batches.close()
    assert asked[4:] == mixture.batch(1)[:1] * 2, "tried once more, and no further step read"
    assert not readers()


def test_data_sets_are_opened_with_patience_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails at its start has made no checkpoint, and is put back for ten minutes only a few times."""
    directory = write_packs(tmp_path / "d", numbered_packs(10))
    monkeypatch.setattr(passing, "WAITS_SECONDS", (0.0,))
    monkeypatch.setattr(reader, "read_index", Faults(reader.read_index, 1))
    assert len(open_mixture(directory).batch(0)) == 4


def test_a_compressed_shard_that_cannot_be_read_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_packs(tmp_path / "d", numbered_packs(10), compression="zstd")
    monkeypatch.setattr(passing, "WAITS_SECONDS", (0.0,))
    faults = Faults(reader.open_compressed, 1, OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(reader, "open_compressed", faults)
    open_mixture(directory)
    faults.left = 2
    for shard in directory.glob("*.mds"):
        shard.unlink()
    with pytest.raises(PassingError, match=r"zstd: cannot be unpacked now .*Input/output error"):
        open_mixture(directory)
