"""What is found before the first prompt: the results of an earlier run, and lengths that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import Parrot
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import results, run, suite
from megatron_prolong.evaluation.changes import changes
from megatron_prolong.evaluation.identity import model_identity
from megatron_prolong.evaluation.partial import Generated, PartialOutputs
from megatron_prolong.evaluation.results import read_arguments
from megatron_prolong.evaluation.run import Settings, run_task
from megatron_prolong.evaluation.suite import refuse_another_model, run_suite
from megatron_prolong.evaluation.suite_report import notes
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Inputs


@pytest.mark.parametrize(
    ("model", "identity", "taken"),
    [("A/64k", "new", True), ("moved", "x", True), ("B/64k", "y", False), ("served", "", False)],
)
def test_a_folder_holds_the_results_of_one_model(
    model: str, identity: str, taken: bool, tmp_path: Path
) -> None:
    """Both may be called 64k, after the last part of their paths."""
    exported = {"args": {"model_name_or_path": "A/64k exported", "model_identity": "z"}}
    (tmp_path / "short.json").write_text(json.dumps(exported))
    arguments = {"model_name_or_path": "A/64k", "model_identity": "x"}
    (tmp_path / "json_kv_in8192_shots2.json").write_text(json.dumps({"args": arguments}))
    if taken:
        refuse_another_model(tmp_path, model, identity)
    else:
        with pytest.raises(UserError, match="another model, A/64k; name this one"):
            refuse_another_model(tmp_path, model, identity)


def test_a_result_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "json_kv_in8192_shots2.json").write_bytes(b"\xcb\x00\xff")
    with pytest.raises(
        UserError, match=r"shots2\.json: cannot be read .*; delete it, and run the task again"
    ):
        refuse_another_model(tmp_path, "model", "x")


def test_the_settings_of_a_result_are_read_without_its_answers(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of RAG at 128K take hundreds of megabytes, and every start looks at all files of the folder."""
    (task,) = select("synthetic", [1024], ["json_kv"])
    inputs, settings = Inputs(None, tokenizer, max_samples=1), Settings(model_identity="x")
    path = run_task(task, Parrot(tokenizer), inputs, settings, tmp_path).path
    older = json.loads(path.read_text())
    older["args"] = older.pop("args")
    (tmp_path / "older_shots2.json").write_text(
        json.dumps(older)
    )  # as versions before wrote them, settings last
    for file in (path, tmp_path / "older_shots2.json"):
        assert read_arguments(file)["datasets"] == "json_kv"
    (tmp_path / "older_shots2.json").unlink()
    for module in (results, suite, run):
        monkeypatch.setattr(module, "read_json", pytest.fail, raising=False)
    refuse_another_model(tmp_path, "parrot", "y")
    with pytest.raises(UserError, match="another model"):
        refuse_another_model(tmp_path, "other", "y")


def test_questions_made_for_another_tokenizer_are_not_paired(
    tokenizer: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """RULER's go by their number, 0, 1, …, whatever text they are hidden in."""
    tasks, models = select("ruler", [2048], ["niah_s_1"]), {}
    for label, own in (("a", tokenizer), ("b", tokenizer), ("c", byte_tokenizer)):
        inputs = Inputs(None, own, max_samples=2)
        models[label] = run_suite(tasks, Parrot(own), inputs, Settings(), tmp_path / label)
    assert [one.interval is None for one in changes(models)] == [False, True]
    assert [line for line in notes(models, None) if "against" in line] == [
        "c against a: other prompts, so no change is given: ruler_niah_s_1"
    ]


def test_what_a_task_does_not_use_makes_no_new_result(tokenizer: Any, tmp_path: Path) -> None:
    tasks = select("ruler", [2048], ["niah_s_1", "niah_s_2", "niah_mk_2"])
    parrot, inputs = Parrot(tokenizer), Inputs(None, tokenizer, max_samples=1)
    run_suite(tasks, parrot, inputs, Settings(), tmp_path / "out")
    assert len(parrot.seen) == 3
    tokenizer.save_pretrained(tmp_path / "llama2_tokenizer")
    run_suite(tasks, parrot, replace(inputs, data=tmp_path), Settings(), tmp_path / "out")
    assert len(parrot.seen) == 3, "none cuts a document"
    run_suite(tasks, parrot, inputs, Settings(too_long="allow"), tmp_path / "out")
    assert len(parrot.seen) == 3, "none is too long"
    run_suite(tasks, parrot, replace(inputs, haystack="An essay. Another."), Settings(), tmp_path / "out")
    assert len(parrot.seen) == 4, "only niah_s_2 hides its needle in prose"


def test_a_mended_template_or_stop_token_makes_another_model(
    hf_directory: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for source, words in ((hf_directory, "."), (checkpoint, "hf")):
        model = shutil.copytree(source, tmp_path / words / "model")
        seen = {model_identity(model)}
        for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            file = model / words / name
            before = file.read_text()
            file.write_text(before + " ")
            seen.add(model_identity(model))
            file.write_text(before)
        assert len(seen) == 5 and model_identity(model) in seen, "by content, not by time"


def test_lengths_beyond_a_model_are_refused_before_the_first_is_measured(
    hf_directory: Path, checkpoint: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model declares 1K."""
    parrot = Parrot(tokenizer, max_length=1024)
    with pytest.raises(UserError, match="at 2K: parrot declares at most 1,024"):
        run_suite(select("synthetic", [512, 2048]), parrot, Inputs(None, tokenizer), Settings(), tmp_path)
    assert not parrot.seen
    longer = shutil.copytree(hf_directory, tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    monkeypatch.setattr("megatron_prolong.evaluation.backend.open_backend", pytest.fail)
    for second in (hf_directory, checkpoint):
        arguments = ["eval", "run", str(longer), "--compare", str(second), "--out", str(tmp_path / "out")]
        found = CliRunner().invoke(app, [*arguments, "--suite", "synthetic", "--lengths", "2K"])
        assert isinstance(found.exception, UserError), found.output
        assert f"at 2K: {second} declares at most 1,024" in str(found.exception)


def test_a_task_that_fails_at_its_first_answer_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.partial.jsonl"
    with pytest.raises(InterruptedError), PartialOutputs(path):
        raise InterruptedError
    assert not path.exists()
    with pytest.raises(InterruptedError), PartialOutputs(path) as partial:
        partial.add(Generated("key", "said", 1, 1, 0, "asked"))
        raise InterruptedError
    assert PartialOutputs(path).done.keys() == {"key"}


def test_answers_outlive_a_process_that_is_killed_and_half_a_line_of_it(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.partial.jsonl", [Generated(key, "said", 1, 1, 0, "asked") for key in "ab"]
    with PartialOutputs(path) as partial:
        partial.add(samples[0])
        assert len(path.read_text().splitlines()) == 1, "written at once"
    with path.open("a") as file:
        file.write('{"key": "half')
    with PartialOutputs(path) as partial:
        partial.add(samples[1])
    with PartialOutputs(path) as partial:
        assert list(partial.done.values()) == samples
