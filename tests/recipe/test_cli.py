import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prolong.recipe.load import load_recipe

Write = Callable[..., Path]


def test_show_prints_what_loads_as_the_same_recipe(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any]
) -> None:
    path = write(recipe_data)
    code, out, _ = prolong("recipe", "show", path, "stage.one.lr=2e-5", "layout.tp=2")
    assert code == 0
    overridden = load_recipe(path, ["stage.one.lr=2e-5", "layout.tp=2"])
    assert load_recipe(write(out, "shown.yaml")) == overridden
    assert yaml.safe_load(out)["stages"][0]["lr"] == 2e-5


def test_check(prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    code, out, err = prolong("recipe", "check", path, "--world-size", 8)
    assert (code, err) == (0, "")
    assert "two: 32 steps of 8 × 4096 tokens (1,048,576 in all)" in out
    code, out, err = prolong(
        "recipe", "check", path, "precision=fp8", "layout.cp=3", "--world-size", 8, "--cpu"
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe.yaml: the recipe has 3 problems:")  # each stage's ranks, and fp8


def test_check_knows_what_an_evaluation_needs(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any]
) -> None:
    recipe_data["evaluation"] = {"suite": "helmet", "lengths": [8192], "tasks": ["recall", "rag"]}
    path = write(recipe_data)
    code, _, err = prolong("recipe", "check", path, "layout.cp=3", "--world-size", 8)
    assert code == 2 and "evaluation: no data for kilt_nq (8K)" in err and "has 3 problems" in err
    code, _, err = prolong("recipe", "check", path, "evaluation.tasks=[recall, typo]")
    assert code == 2 and "evaluation: suite helmet has no task typo" in err
    code, _, err = prolong("recipe", "check", path, "evaluation.suite=synthetic", "evaluation.tasks=[]")
    assert (code, err) == (0, "")


def test_schema(prolong: Callable[..., tuple]) -> None:
    code, out, _ = prolong("recipe", "schema")
    assert code == 0 and "stages" in json.loads(out)["properties"]


def test_a_path_that_cannot_be_written_is_one_line(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    path, absent = write(recipe_data), tmp_path / "file" / "script.sh"
    absent.parent.write_text("a file where a directory is needed")
    code, _, err = prolong("launch", path, "--output", absent)
    assert code == 2
    assert err.startswith(f"error: {absent.parent}: File exists")
    with pytest.raises(FileExistsError):
        prolong("launch", path, "--output", absent, "--debug")
    code, _, err = prolong("launch", path, "--output", tmp_path)
    assert code == 2 and f"error: {tmp_path}: Is a directory" in err  # not the temporary name
    code, _, err = prolong("launch", path, "--output", "/proc/script.sh")
    assert code == 2 and err.splitlines()[-1].startswith("error: /proc/script.sh: No such file or directory")


def test_a_directory_for_the_script_is_made(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    code, _, _ = prolong("launch", write(recipe_data), "--output", tmp_path / "jobs" / "long" / "script.sh")
    assert code == 0 and (tmp_path / "jobs/long/script.sh").is_file()


def test_more_gpus_than_a_node_can_have_are_refused(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any]
) -> None:
    code, _, err = prolong("launch", write(recipe_data), "--gpus-per-node", 8000)
    assert code == 2 and "'--gpus-per-node'" in err and "16" in err


def test_a_full_disk_is_one_line_where_the_file_has_no_name(
    prolong: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a line of metrics.jsonl does not fit any more."""

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_prolong.recipe.load.load_recipe", write)
    code, _, err = prolong("train", "recipe.yaml")
    assert (code, err) == (2, "error: No space left on device (--debug shows where)\n")


def test_a_bad_recipe_stops_before_torchrun(
    prolong: Callable[..., tuple],
    write: Write,
    recipe_data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("torchrun was started"))
    code, _, err = prolong("train", write(recipe_data), "layout.cp=2", "--processes", 3)
    assert code == 2 and err.startswith("error: recipe.yaml: the recipe has ")
