"""Sources to tokenized documents: the right tokens, the same bytes however it is run, and what bad input does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from documents import files_of
from llama3 import llama3_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from megatron_prolong.cli.data import app
from megatron_prolong.data import encoder as encoder_module
from megatron_prolong.data import tokenize as tokenize_module
from megatron_prolong.data.executors import LocalProcesses
from megatron_prolong.data.mds import MDSReader
from megatron_prolong.data.sources import Record
from megatron_prolong.data.tokenize import TokenizeOptions, TokenizeReport, tokenize
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import tokenizer_fingerprint


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "TASK_BYTES", 300)


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(sources: list[Path], tokenizer: Path, out: Path, **options: object) -> TokenizeReport:
    report = tokenize([str(each) for each in sources], tokenizer, out, TokenizeOptions(**options))  # type: ignore[arg-type]
    assert report is not None
    return report


def test_columns_tokens_and_report(tokenizer: Path, tmp_path: Path) -> None:
    records = [{"text": "The capital of France", "from": "a"}, {"text": ""}, {"text": "42\n", "from": "b"}]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    report = run([source], tokenizer, tmp_path / "out", domain="facts")
    reader = MDSReader(tmp_path / "out")
    assert reader.columns == {"domain": "str", "input_ids": "ndarray:uint32", "length": "int"}
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for sample, text in zip(reader, ["The capital of France", "42\n"], strict=True):
        assert sample["input_ids"].tolist() == library.encode(text, add_special_tokens=False).ids
        assert sample["length"] == len(sample["input_ids"]) and sample["domain"] == "facts"
    assert report.documents == 2 and report.left_out == {"document: empty": 1}
    assert report.tokens == sum(sample["length"] for sample in reader)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tokens"] == report.tokens
    run([source], tokenizer, tmp_path / "by", domain="none", domain_field="from")
    assert [sample["domain"] for sample in MDSReader(tmp_path / "by")] == ["a", "b"]


def test_batches_hold_every_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No longer than asked for by more than their last record, nor many thousands of empty ones."""
    monkeypatch.setattr(tokenize_module, "_BATCH_BYTES", 10)
    for lengths, sizes in (([4, 4, 4, 4, 12, 1], [3, 2, 1]), ([0] * 5000, [4096, 904]), ([10, 1, 9], [1, 2])):
        texts = ["x" * length for length in lengths]
        fields = [{"text": text} if number % 2 else {"m": [{"c": text}]} for number, text in enumerate(texts)]
        records = [Record(str(number), each) for number, each in enumerate(fields)]
        batches = list(tokenize_module._batches(iter(records)))
        assert [len(batch) for batch in batches] == sizes
        assert [record for batch in batches for record in batch] == records


def test_places_cut_by_force_are_counted(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tasks: None
) -> None:
    monkeypatch.setattr(encoder_module, "SEGMENT_CHARACTERS", 100)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x" * 350)
    assert run([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, tmp_path / "out").forced_cuts == 6


def test_what_is_left_out_of_several_tasks_and_of_repositories_is_counted(
    tokenizer: Path, tmp_path: Path, small_tasks: None
) -> None:
    for number in range(3):
        root = tmp_path / "src" / str(number)
        root.mkdir(parents=True)
        (root / "a.py").write_text("print(1)\n" * 40)
        (root / "b.bin").write_bytes(bytes(range(9)))
    (root / "a.py").unlink()  # so that nothing of this one is taken
    (tmp_path / "src" / "README").touch()
    report = run([tmp_path / "src"], tokenizer, tmp_path / "out", kind="repositories")
    assert len(list((tmp_path / "out").glob("0*"))) > 1 and report.documents == 2
    left_out = {"file: binary": 3, "document: a file beside the repositories": 1, "document: empty": 1}
    assert report.left_out == left_out


def test_nested_fields(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"a": {"b": "x y"}}, {"a.b": "z"}, {"a": "a b"}])
    report = run([source], tokenizer, tmp_path / "out", text_field="a.b", on_bad_input="skip")
    assert report.documents == 2 and report.left_out == {"document: no field a.b": 1}


def test_a_text_without_tokens_is_empty(tmp_path: Path) -> None:
    """As blanks are to a tokenizer that strips them; a sample without tokens could not be read."""
    words = Tokenizer(models.WordLevel({"word": 0}, "word"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": " \n"}, {"text": "word"}])
    report = run([source], tmp_path, tmp_path / "out")
    assert report.documents == 1 and report.left_out == {"document: empty": 1}


def test_bytes_do_not_depend_on_workers(tokenizer: Path, tmp_path: Path, small_tasks: None) -> None:
    """Nor on whether a task was done by Slurm jobs, in what order, or twice."""
    for number in range(12):
        write_jsonl(
            tmp_path / f"in{number:02}.jsonl", [{"text": f"text {number} {n}\n" * 9} for n in range(5)]
        )
    sources = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    tokenize(sources, tokenizer, tmp_path / "one")
    tokenize(sources, tokenizer, tmp_path / "three", executor=LocalProcesses(3))
    jobs = [
        {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
        for i in (7, 5)
    ]
    for job in jobs:
        assert tokenize(sources, tokenizer, tmp_path / "slurm", slurm=job) is None
        assert not (tmp_path / "slurm").exists()
    # job 6 failed and is submitted again, alone: it takes all that is left
    alone = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "6"}
    report = tokenize(sources, tokenizer, tmp_path / "slurm", slurm=alone)
    assert report is not None and report.documents == 60
    assert len(files_of(tmp_path / "one")) == 3 + 12 * 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three") == files_of(tmp_path / "slurm")
    # and a job that comes too late finds everything done
    assert tokenize(sources, tokenizer, tmp_path / "slurm", slurm=jobs[0]) == report


def test_a_run_stopped_by_bad_input_continues_after_the_repair(
    tokenizer: Path, tmp_path: Path, small_tasks: None
) -> None:
    for number in range(4):
        write_jsonl(tmp_path / f"in{number}.jsonl", [{"text": "word " * 60}])
    bad = tmp_path / "in2.jsonl"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff" + good[1:])
    sources = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    with pytest.raises(UserError, match=r"in2\.jsonl, line at byte 0: is not UTF-8.*--on-bad-input skip"):
        tokenize(sources, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finished = sorted((tmp_path / "out.partial").glob("0*"))
    assert [path.name for path in finished] == ["00000", "00001"]
    bad.write_bytes(good)
    inode = (finished[0] / "shard.00000.mds").stat().st_ino
    report = tokenize(sources, tokenizer, tmp_path / "out")
    assert report is not None and report.documents == 4
    assert (tmp_path / "out" / "00000" / "shard.00000.mds").stat().st_ino == inode


def test_other_settings_do_not_continue_a_begun_run(
    tokenizer: Path, tmp_path: Path, small_tasks: None
) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 60}])
    second = write_jsonl(tmp_path / "b.jsonl", ["not an object"])
    sources = [str(first), str(second)]
    with pytest.raises(UserError, match="is not a JSON object"):
        tokenize(sources, tokenizer, tmp_path / "out", TokenizeOptions(domain="x"))
    with pytest.raises(UserError, match=r"begun with other settings.*\n  - domain: was x, now y"):
        tokenize(sources, tokenizer, tmp_path / "out", TokenizeOptions(domain="y"))


def test_a_source_is_the_same_by_another_spelling(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell completes a directory's name with a slash, and a stopped job would not go on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "x"}])
    for spelling in ("in", "in/", "./in"):
        assert tokenize([spelling], tokenizer, tmp_path / "out") is not None


def test_a_result_that_is_there_says_that_nothing_was_done(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who corrected a letter would take the old documents for new ones."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    run([source], tokenizer, tmp_path / "out")
    assert "made before" not in capsys.readouterr().err
    write_jsonl(source, [{"text": "y"}])
    run([source], tokenizer, tmp_path / "out")
    assert (
        f"warning: {tmp_path}/out: made before, of files of these names and sizes;" in capsys.readouterr().err
    )


def test_files_of_other_lengths_are_another_job(tokenizer: Path, tmp_path: Path) -> None:
    """Even as many of them, of as many bytes together."""
    source = tmp_path / "texts"
    source.mkdir()
    for first, second in (("three", "four"), ("four", "three")):
        (source / "a.txt").write_text(first)
        (source / "b.txt").write_text(second)
        if first == "three":
            run([source], tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="out exists already"):
        run([source], tokenizer, tmp_path / "out")


def test_a_job_that_bad_input_stopped_goes_on_with_skip(
    tokenizer: Path, tmp_path: Path, small_tasks: None
) -> None:
    """Its message says so, but the finished tasks had to be thrown away."""
    sources = [
        write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 60}]),
        write_jsonl(tmp_path / "b.jsonl", [7]),
    ]
    with pytest.raises(UserError, match=r"is not a JSON object.*--on-bad-input skip"):
        run(sources, tokenizer, tmp_path / "out")
    (done,) = (tmp_path / "out.partial").glob("*/shard.00000.mds")
    inode = done.stat().st_ino
    report = run(sources, tokenizer, tmp_path / "out", on_bad_input="skip")
    assert report.documents == 1 and report.left_out == {"document: not an object": 1}
    assert (tmp_path / "out" / "00000" / "shard.00000.mds").stat().st_ino == inode


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"text": 7}', "field 'text' is int, not text", "not text"),
        (
            b'{"txt": "a"}',
            r"field 'text' is missing or null \(fields: txt; --text-field names",
            "no field text",
        ),
        (b'{"text": null}', r"field 'text' is missing or null \(fields: text; --text-field", "no field text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0", "not UTF-8"),
        (b"[1]", "is not a JSON object but list; a JSON array becomes JSON Lines by `jq", "not an object"),
        (b"[", r"is not JSON \(.*\); a JSON array becomes JSON Lines by `jq", "not JSON"),
        (b'{"text"', "is not JSON", "not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8", "not UTF-8"),
    ],
)
def test_bad_records_stop_or_are_skipped_and_counted(
    line: bytes, message: str, reason: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"in\.jsonl, line at byte 17: .*{message}"):
        run([source], tokenizer, tmp_path / "out")
    report = run([source], tokenizer, tmp_path / "out", on_bad_input="skip")
    assert report.documents == 1 and report.left_out == {f"document: {reason}": 1}


def test_a_domain_that_is_no_text_is_bad_input_like_any_other(tokenizer: Path, tmp_path: Path) -> None:
    """It stopped the job even with `skip`, and named the sample to be written instead of the record."""
    records = [{"text": "a", "from": "b"}, {"text": "a", "from": "x\ud83d"}]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    with pytest.raises(UserError, match=r"in\.jsonl, line at byte 27: has half a surrogate pair"):
        run([source], tokenizer, tmp_path / "out", domain_field="from")
    report = run([source], tokenizer, tmp_path / "out", domain_field="from", on_bad_input="skip")
    assert report.documents == 1 and report.left_out == {"document: not UTF-8": 1}


def test_domains_that_the_records_name(tokenizer: Path, tmp_path: Path) -> None:
    """0 counted as none, and a misspelt field gave every document the name of OUT."""
    records = [{"text": "a", "of": {"cluster": name}} for name in (0, 1, "x", None, "", [1])]
    source = write_jsonl(tmp_path / "in.jsonl", [*records, {"text": "a"}, {"text": ""}])
    for given, domains, left_out in (("", ["0", "1", "x"], 4), ("rest", ["0", "1", "x", *["rest"] * 3], 1)):
        options = {"domain": given, "domain_field": "of.cluster", "on_bad_input": "skip"}
        report = run([source], tokenizer, tmp_path / f"out{given}", **options)
        assert [sample["domain"] for sample in MDSReader(tmp_path / f"out{given}")] == domains
        assert report.left_out == {"document: no domain": left_out, "document: empty": 1}
    words = ["tokenize", source, tmp_path / "misspelt", "--tokenizer", tokenizer, "--domain-field", "cluster"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "field 'cluster' names no domain (fields: text, of); with --domain" in str(result.exception)


def test_a_target_inside_a_source_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    """Its job.json was read as JSON Lines when the job went on, which ended it as one of other settings."""
    source = tmp_path / "texts"
    source.mkdir()
    write_jsonl(source / "a.jsonl", [{"text": "a"}])
    (tmp_path / "link").symlink_to(source)
    for out in (source / "out", tmp_path / "link" / "deep" / "out"):
        with pytest.raises(UserError, match=r"out: lies in .*texts, and would be read as a part of it"):
            tokenize([str(source)], tokenizer, out)
    report = tokenize([str(source)], tokenizer, tmp_path / "texts-out")
    assert report is not None and report.documents == 1


def test_a_source_that_is_given_twice_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    """Also by another name, and a file beside its directory: every document would be there twice."""
    (tmp_path / "in").mkdir()
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "x"}])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": "y"}])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for again in (source, tmp_path / "in" / ".." / "in" / "a.jsonl", tmp_path / "in", tmp_path / "link"):
        with pytest.raises(UserError, match=rf"{source} and .*/a.jsonl are the same, whose documents would"):
            run([source, again], tokenizer, tmp_path / "out")
    assert run([source, tmp_path / "in" / "b.jsonl"], tokenizer, tmp_path / "out").documents == 2
    (tmp_path / "in" / "latest.jsonl").symlink_to("b.jsonl")
    with pytest.raises(UserError, match=r"in/b\.jsonl and .*in/latest\.jsonl are the same"):
        run([tmp_path / "in"], tokenizer, tmp_path / "all")


def test_nothing_at_all(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    with pytest.raises(UserError, match="not a single document in the sources; left out: nothing"):
        run([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        run([tmp_path / "in.jsonl"], tmp_path, tmp_path / "out")


def test_chats_have_masks(tokenizer: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "An answer."}]
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat}, {"messages": chat * 4}])
    report = run([source], tokenizer, tmp_path / "out", kind="chat")
    first, second = MDSReader(tmp_path / "out")
    decode = llama3_tokenizer().decode
    assert decode(first["input_ids"][first["mask"] == 1]) == "An answer.<|eot_id|>"
    assert report.targets == int(first["mask"].sum() + second["mask"].sum())
    limit = len(first["input_ids"]) + 3
    run([source], tokenizer, tmp_path / "cut", kind="chat", max_chat_tokens=limit)
    np.testing.assert_array_equal(MDSReader(tmp_path / "cut")[1]["input_ids"], first["input_ids"])
    only = write_jsonl(tmp_path / "only.jsonl", [{"messages": chat[:1]}])
    with pytest.raises(
        UserError, match=r"only\.jsonl, line at byte 0: no message of this chat is the assistant"
    ):
        run([only], tokenizer, tmp_path / "zeros", kind="chat")
    assert not (tmp_path / "zeros").exists()


def test_a_run_stopped_by_a_full_disk_continues_when_there_is_room(
    tokenizer: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_module, "TASK_BYTES", 50_000)
    for number in range(10):
        (tmp_path / f"in{number}.txt").write_text(f"{number} word\n" * 10_000)
    sources = [str(path) for path in sorted(tmp_path.glob("*.txt"))]
    with pytest.raises(UserError, match=r"the disk is full; what was unfinished has been removed"):
        tokenize(sources, tokenizer, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]
    assert not list(small_disk.rglob("*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    tokenize(sources, tokenizer, small_disk / "out")
    tokenize(sources, tokenizer, tmp_path / "whole")
    assert files_of(small_disk / "out") == files_of(tmp_path / "whole")


def test_commands(tokenizer: Path, tmp_path: Path) -> None:
    """The whole way on the command line: repositories to packs."""
    for number in range(3):
        (tmp_path / "src" / f"r{number}").mkdir(parents=True)
        (tmp_path / "src" / f"r{number}" / "a.py").write_text("print(42)\n" * 50 * (number + 1))
    invoke = CliRunner().invoke
    result = invoke(app, ["sources"])
    assert "repositories" in result.output and "parquet" in result.output
    words = [
        "tokenize",
        tmp_path / "src",
        tmp_path / "code",
        "--kind",
        "repositories",
        "--tokenizer",
        tokenizer,
    ]
    result = invoke(app, [str(word) for word in [*words, "--workers", 1]])
    assert result.exit_code == 0 and "code: 3 documents" in result.output, result.output
    for wrong in (["--bos", -1], ["--eos", 2**32], ["--shuffle-seed", -1]):
        words = ["pack", tmp_path / "code", tmp_path / "packs", "--length", "1K", "--mode", "concat", *wrong]
        assert invoke(app, [str(word) for word in words]).exit_code == 2
    words = ["filter", tmp_path / "code", tmp_path / "long", "--min-length", "code=0.375K", "--workers", 1]
    result = invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and "kept 2 documents" in result.output, result.output
    words = [
        "pack",
        tmp_path / "long",
        tmp_path / "packs",
        "--length",
        "0.25K",
        "--mode",
        "single",
        "--workers",
        1,
    ]
    result = invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and "packs of 256 tokens" in result.output, result.output
    assert {sample["domain"] for sample in MDSReader(tmp_path / "packs")} == {"code"}
    result = invoke(app, ["merge", str(tmp_path / "packs")])
    assert result.exit_code == 0, result.output
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint is not None
    for name in ("code", "long", "packs"):
        assert MDSReader(tmp_path / name).tokenizer == fingerprint
    assert isinstance(invoke(app, ["pack", "one", "--length", "4", "--mode", "concat"]).exception, UserError)
