"""What `prolong eval` makes of its command line, before any model is opened."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from samples import write_data
from servers import Server, client
from typer.testing import CliRunner

from megatron_prolong.cli import eval_suite
from megatron_prolong.cli.eval import folders, models_of, names_of
from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError


def test_a_tag_that_is_no_part_of_a_file_name_is_refused(tmp_path: Path) -> None:
    arguments = ["eval", "run", str(tmp_path), "--out", str(tmp_path), "--tag", "a/b"]
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, UserError) and "--tag a/b: becomes a part of file names" in str(refused)


def test_what_citations_need_is_missed_before_any_answer(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> None:
        raise UserError("needs punkt")

    def opened(*_: object) -> None:
        raise InterruptedError

    nli: list[Path] = []
    monkeypatch.setattr("megatron_prolong.evaluation.sentences.split_sentences", missing)
    monkeypatch.setattr("megatron_prolong.evaluation.nli.load_nli", nli.append)
    monkeypatch.setattr(eval_suite, "_open", opened)
    arguments = ["eval", "run", str(hf_directory), "--out", str(tmp_path / "out"), "--nli", str(hf_directory)]
    arguments += ["--data", str(write_data(tmp_path)), "--lengths", "8k", "--too-long", "allow"]
    refused = CliRunner().invoke(app, [*arguments, "--tasks", "cite"])
    assert isinstance(refused.exception, UserError) and "needs punkt" in str(refused.exception)
    without = CliRunner().invoke(app, [*arguments, "--tasks", "rag"])
    assert isinstance(without.exception, InterruptedError) and not nli, "which has no citations"
    monkeypatch.setattr("megatron_prolong.evaluation.sentences.split_sentences", lambda _: [])
    CliRunner().invoke(app, [*arguments, "--tasks", "cite"])
    assert nli == [hf_directory]
    wrong = CliRunner().invoke(app, [*arguments, "--tasks", "rag", "--nli", str(tmp_path)]).exception
    assert isinstance(wrong, UserError) and f"{tmp_path}: no model here; --nli wants" in str(wrong)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "Not a directory"),
        (["--backend", "openai"], "needs --server URL"),
        (["--backend", "openai", "--server", "localhost:8000"], "needs --server URL, and --tokenizer"),
        (
            ["--backend", "openai", "--server", "localhost:8000", "--tokenizer", "MODEL"],
            "begins with http://",
        ),
    ],
)
def test_what_is_wrong_is_found_before_the_inference_model_is_loaded(
    more: list[str], said: str, hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has 11B weights."""
    monkeypatch.setattr("megatron_prolong.evaluation.nli.load_nli", pytest.fail)
    (tmp_path / "file").write_text("")
    arguments = ["eval", "run", "MODEL", "--out", str(tmp_path / "file" / "out"), "--nli", "MODEL"]
    arguments += ["--data", str(write_data(tmp_path)), "--lengths", "8k", "--too-long", "allow"]
    arguments += ["--tasks", "cite", *more]
    given = [str(hf_directory) if argument == "MODEL" else argument for argument in arguments]
    assert said in str(CliRunner().invoke(app, given).exception)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [("400", "does not serve huge; it serves long, tiny"), ("600", "at 600: tiny declares at most 512")],
)
def test_every_model_is_asked_for_at_its_server_before_the_first_is_measured(
    lengths: str,
    said: str,
    hf_directory: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eval_suite, "_open", pytest.fail)
    served = {"long": 1024, "tiny": 512}
    server.whole_answer = {"data": [{"id": name, "max_model_len": most} for name, most in served.items()]}
    arguments = ["eval", "run", "long", "--compare", "tiny", "--compare", "huge", "--out", str(tmp_path)]
    arguments += ["--backend", "openai", "--server", client(server).base_url]
    arguments += ["--tokenizer", str(hf_directory)]
    arguments += ["--suite", "synthetic", "--lengths", lengths, "--tasks", "ruler_niah_s_1"]
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, UserError) and said in str(refused)


@pytest.mark.parametrize("option", ["--server", "--tokenizer"])
def test_a_served_model_is_asked_for_by_its_backend(option: str, tmp_path: Path) -> None:
    """It was looked for on the disk."""
    arguments = ["eval", "run", "my-model", "--out", str(tmp_path), option, "http://localhost:8000/v1"]
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, UserError) and "add --backend openai" in str(refused)


def test_only_the_main_rank_loads_the_inference_model(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is the main one, the ranks know; the environment is not asked again."""
    main, other = (SimpleNamespace(is_main=is_main) for is_main in (True, False))
    for name in ("check_models", "_open"):
        monkeypatch.setattr(eval_suite, name, lambda *_: nullcontext(None))
    monkeypatch.setattr(eval_suite, "on_all_ranks", lambda world, action: action())
    monkeypatch.setattr(eval_suite, "ranks", lambda: nullcontext(other))
    missing = tmp_path / "no model here"
    arguments = ["eval", "run", str(hf_directory), "--out", str(tmp_path), "--nli", str(missing)]
    arguments += ["--too-long", "allow"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    monkeypatch.setattr(eval_suite, "ranks", lambda: nullcontext(main))
    refused = CliRunner().invoke(app, [*arguments, "--suite", "synthetic"])
    assert isinstance(refused.exception, UserError) and str(missing) in str(refused.exception)
    refused = CliRunner().invoke(app, [*arguments, "--backend", "openai"])
    assert "one process asks the server" in str(refused.exception), "not every rank, for the same files"


@pytest.mark.parametrize(
    ("command", "measure"), [("perplexity", "perplexity.measure"), ("needle", "needle.run")]
)
def test_a_length_beyond_the_models_is_warned_of(
    command: str, measure: str, hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model declares 1K. `run` refuses such lengths; here they may be the very question."""

    def measured(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(f"megatron_prolong.evaluation.{measure}", measured)
    (tmp_path / "text.txt").write_text("It may be asked for on purpose. " * 200)
    more = ["--data", str(tmp_path / "text.txt")] if command == "perplexity" else []
    for lengths, warned in (("512,1K", False), ("512,1025", True)):
        arguments = ["eval", command, str(hf_directory), "--out", str(tmp_path), "--lengths", lengths, *more]
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, InterruptedError)
        assert ("declares at most 1,024 tokens" in found.stderr) == warned


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("perplexity", ["--data", "held out.txt"]),
        ("needle", []),
        ("run", ["--suite", "synthetic", "--lengths", "1K", "--tasks", "ruler_niah_s_1"]),
        ("run", ["--suite", "short"]),
        ("lm-eval", ["--tasks", "own", "--include", "."]),
    ],
)
def test_a_place_that_cannot_be_written_is_met_before_measuring(
    command: str, more: list[str], hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for opens in ("backend.open_backend", "harness_tasks.open_backend", "short.run_short"):
        monkeypatch.setattr(f"megatron_prolong.evaluation.{opens}", pytest.fail)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(all_tasks=["own"]))
    monkeypatch.chdir(tmp_path)
    file = Path("held out.txt")
    file.write_text("words")
    found = CliRunner().invoke(app, ["eval", command, str(hf_directory), "--out", str(file / "out"), *more])
    assert isinstance(found.exception, NotADirectoryError)


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_run_leaves_no_empty_folders(
    there: bool, hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        assert (out / "tiny").is_dir(), "made before hours of measuring"
        raise InterruptedError

    monkeypatch.setattr(eval_suite, "_open", opened)
    out = tmp_path / "new" / "results"
    if there:
        out.mkdir(parents=True)
    asked = ["--suite", "synthetic", "--lengths", "1K", "--tasks", "ruler_niah_s_1"]
    found = CliRunner().invoke(app, ["eval", "run", str(hf_directory), "--out", str(out), *asked])
    assert isinstance(found.exception, InterruptedError)
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if there else [])


def test_a_folder_that_cannot_be_written_in_is_met_before_measuring() -> None:
    with pytest.raises(OSError), folders() as make:
        make(Path("/proc"))


@pytest.mark.parametrize(
    ("there", "lost"),
    [
        ({"models": {"a": {}, "other": {}}}, "results of other"),
        ({"models": {"a": {}}, "seed": 43}, "results of another seed"),
        ({"models": {"a": {}}}, None),
    ],
)
@pytest.mark.parametrize("command", ["perplexity", "needle"])
def test_results_of_something_else_are_not_written_over(
    command: str,
    there: dict,
    lost: str | None,
    hf_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("megatron_prolong.evaluation.backend.open_backend", opened)
    text = tmp_path / "text.txt"
    text.write_text("words")
    asked = {"data": [str(text)]} if command == "perplexity" else {"haystack": "noise"}
    (tmp_path / f"{command}.json").write_text(json.dumps({**asked, "seed": 42, **there}))
    more = ["--data", str(text)] if command == "perplexity" else []
    found = CliRunner().invoke(app, ["eval", command, f"a={hf_directory}", "--out", str(tmp_path), *more])
    if lost is None:
        assert isinstance(found.exception, InterruptedError)  # the same again, of the same model
    else:
        assert isinstance(found.exception, UserError)
        assert f"{command}.json holds {lost}, which would be lost" in str(found.exception)


@pytest.mark.parametrize("damaged", ['{"models": ["a"]}', '{"seed": 42}', '{"models": {"a"', "[]"])
@pytest.mark.parametrize("command", ["perplexity", "needle"])
def test_a_damaged_file_of_earlier_results_is_named_before_measuring(
    command: str, damaged: str, hf_directory: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    (tmp_path / f"{command}.json").write_text(damaged)
    more = ["--data", str(text)] if command == "perplexity" else []
    found = CliRunner().invoke(app, ["eval", command, str(hf_directory), "--out", str(tmp_path), *more])
    assert isinstance(found.exception, UserError), found.exception
    said = str(found.exception)
    assert f"{tmp_path}/{command}.json: " in said and said.endswith("; delete it, and run the task again")


def test_a_directory_with_an_equals_sign_in_its_name_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-5/64k").mkdir(parents=True)
    assert models_of("lr=1e-5/64k", ["base=hf"]) == [("64k", "lr=1e-5/64k"), ("base", "hf")]


def test_the_directory_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results went to --out/.. otherwise."""
    (tmp_path / "64k" / "step").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "64k" / "step")
    assert models_of(".", [".."]) == [("step", "."), ("64k", "..")]


def test_names_may_stand_apart() -> None:
    assert names_of("recall, kilt_nq ,,") == ["recall", "kilt_nq"] and names_of(" ") == []


@pytest.mark.parametrize(
    ("measures", "arguments"),
    [
        (
            "backend.open_backend",
            ["run", "MODEL", "--suite", "synthetic", "--lengths", "1k", "--tasks", "json_kv"],
        ),
        ("short.run_short", ["run", "MODEL", "--suite", "short"]),
        ("harness_tasks.run_questions", ["lm-eval", "MODEL", "--tasks", "arc_challenge"]),
        ("judge.judge_results", ["judge", "MODEL", "--server", "http://x", "--helmet", "x"]),
    ],
)
def test_an_interrupt_says_that_the_same_command_continues(
    measures: str, arguments: list[str], hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"megatron_prolong.evaluation.{measures}", interrupted)
    given = [str(hf_directory) if argument == "MODEL" else argument for argument in arguments]
    out = [] if "judge" in given else ["--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, ["eval", *given, *out])
    assert "stopped; the same command continues from what is finished\n" in found.output, found.exception
    assert found.exit_code == 130
