"""Room for checkpoints is looked at before training, and what lies there already is not asked for again."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.plan.disk import CheckpointRoom, check_room, checkpoint_room
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.recipe.shape import read_shape

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "tests/recipe/configs/llama-3-8b-instruct"
Usage = namedtuple("Usage", "total used free")


def recipe(run_dir: Path, *overrides: str) -> Recipe:
    return load_recipe(
        ROOT / "examples/prolong_8b.yaml", [f"run_dir={run_dir}", f"model.path={SHAPE}", *overrides]
    )


def checkpoints_needed(run_dir: Path, *overrides: str) -> int:
    room = checkpoint_room(recipe(run_dir, *overrides), read_shape(SHAPE))
    assert room.one == pytest.approx(112.4e9, rel=1e-3)
    assert room.needed % room.one == 0
    return room.needed // room.one


def test_every_stage_keeps_two_and_one_more_is_written_before_one_is_deleted(tmp_path: Path) -> None:
    assert checkpoints_needed(tmp_path) == 3 * 2 + 1
    assert checkpoints_needed(tmp_path, "checkpoint.keep_every=1000") == (2 + 5) + (2 + 2) + 2 + 1
    assert checkpoints_needed(tmp_path, "checkpoint.every=4000") == 2 + 1 + 1 + 1
    evaluated = "evaluation={every: 500}"  # each time behind a checkpoint of its own
    assert checkpoints_needed(tmp_path, "checkpoint.every=4000", evaluated) == 2 + 2 + 1 + 1


@pytest.mark.parametrize("precision", ["precision=fp32", "stage.sft.precision=fp32"])
def test_a_checkpoint_of_fp32_has_16_bytes_per_weight(tmp_path: Path, precision: str) -> None:
    room = checkpoint_room(recipe(tmp_path, precision), read_shape(SHAPE))
    assert room.one == 16 * 8_030_261_248


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path) -> None:
    for name in (
        "64k/step_00004750",  # one more than is kept: of a run that kept three
        "64k/step_00004875",
        "64k/step_00005000",
        "512k/step_00000125",
        "512k/step_00000250.partial",
    ):
        (tmp_path / name).mkdir(parents=True)
    assert checkpoints_needed(tmp_path) == 1 + 2 + 1
    (tmp_path / "sft/step_00000125").mkdir(parents=True)
    assert checkpoints_needed(tmp_path) == 1 + 1 + 1, "no stage is without one, and not all are done"
    for name in ("512k/step_00002500", "sft/step_00000250"):
        (tmp_path / name).mkdir(parents=True)
    assert checkpoints_needed(tmp_path) == 0


def test_a_disk_that_will_be_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 7 * 112.5e9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    check_room(recipe(tmp_path / "run"))
    message = rf"no room for the checkpoints: 899\.\d GB at most .* 788 GB free at {tmp_path}; free space"
    with pytest.raises(UserError, match=message):
        check_room(recipe(tmp_path / "run", "checkpoint.keep_every=5000"))


def test_half_a_checkpoint_of_a_killed_run_is_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk of the right size, a batch job that starts itself again would stop there for ever."""
    free = 6.9 * 112.5e9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    with pytest.raises(UserError, match="no room"):
        check_room(recipe(tmp_path))
    for leftover in ("64k/step_00000125.partial", "64k/step_00000000.removed.tmp-elsewhere-1"):
        (tmp_path / leftover / "hf").mkdir(parents=True)
        with (tmp_path / leftover / "__1_0.distcp").open("wb") as file:
            file.truncate(6 * 10**9)  # takes no room in truth
    check_room(recipe(tmp_path))


def test_a_small_model_is_told_in_megabytes(tmp_path: Path) -> None:
    room = CheckpointRoom(480_000, 1_440_000, 1_000_000, tmp_path)
    assert str(room) == f"1.4 MB at most (0.5 each), 1 MB free at {tmp_path}"
