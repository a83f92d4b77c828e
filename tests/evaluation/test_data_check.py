"""What `prolong eval data check` tells a user to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from rich.table import Table

from megatron_prolong.cli.eval_suite import data_check
from megatron_prolong.evaluation.data_check import how_to_get
from megatron_prolong.evaluation.identity import data_identity
from megatron_prolong.evaluation.suites import select
from megatron_prolong.runtime.terminal import screen


def test_commands_can_be_pasted_together() -> None:
    """One that changed the directory would send the next one's files into it."""
    files = {need for task in select("helmet", [131072]) for need in task.needs}
    commands = {how_to_get(file, Path("data")) for file in files}
    assert len(commands) > 3 and not any("cd " in command for command in commands)


def test_a_folder_may_have_a_blank_in_its_name(tmp_path: Path) -> None:
    data = tmp_path / "my data"
    downloads = 'hf() { mkdir -p "${@: -1}/default/test"; touch "${@: -1}/default/test/0000.parquet"; }\n'
    subprocess.run(["bash", "-ec", downloads + how_to_get("hf/trec", data)], check=True, cwd=tmp_path)
    assert [file.name for file in (data / "hf/trec").iterdir()] == ["test-0000.parquet"]
    for file in ("hf/infinitebench", "prompts/asqa_revised.json"):
        assert f"'{data}'/" in how_to_get(file, data)


def test_a_length_that_no_file_has_names_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data_check(suite="synthetic", lengths=[8000], tasks="json_kv")
    assert "dep6" not in capsys.readouterr().out
    (task,) = select("synthetic", [8000], ["json_kv"])
    assert not task.files(tmp_path) and data_identity(task, tmp_path) == data_identity(task, None)


def test_a_suite_without_files_of_ours_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    data_check(suite="short")
    assert "fetches its data itself" in capsys.readouterr().out


def test_headings_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("model", *(f"{number}–{2 * number}" for number in (1024, 2048, 4096) * 4))
    screen().print(table)
    assert capsys.readouterr().out.count("4096–8192") == 4
