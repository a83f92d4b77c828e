import threading
import time
from pathlib import Path

import pytest
from packs import numbered_packs, write_packs

from megatron_prolong.data.mixture import Mixture, SampleRef
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.data.stream import stream
from megatron_prolong.errors import UserError


def open_mixture(directory: Path) -> Mixture:
    return Mixture({directory: 1.0}, sequence_length=8, batch_sequences=4, seed=7, num_steps=6)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("first_step", [0, 4])
def test_it_delivers_what_the_mixture_says(tmp_path: Path, first_step: int) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    got = [
        (step, [packed.identity.index for packed in sequences])
        for step, sequences in stream(mixture, first_step)
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
    batches = stream(mixture, 0)
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
        for step, _ in stream(mixture, 0):
            seen.append(step)
    assert seen == list(range(bad_step))
    assert not readers()


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    mixture = open_mixture(write_packs(tmp_path / "d", numbered_packs(10)))
    for _ in stream(mixture, 0):
        break
    assert not readers()
