"""The whole suite on made-up data in HELMET's formats: prompts, files, resuming, truncation, refusals."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import write_data
from stand_ins import Parrot, short_documents

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.averages import averages
from megatron_prolong.evaluation.backend import Prompt, encode
from megatron_prolong.evaluation.changes import changes
from megatron_prolong.evaluation.prompts import prepare, render
from megatron_prolong.evaluation.results import judged_path, read_results
from megatron_prolong.evaluation.rows import read_chosen, read_split
from megatron_prolong.evaluation.run import Settings, run_task
from megatron_prolong.evaluation.suite import run_suite, runnable
from megatron_prolong.evaluation.suite_page import suite_page
from megatron_prolong.evaluation.suite_plot import plot_suite
from megatron_prolong.evaluation.suite_report import grids, notes, print_suite, summary
from megatron_prolong.evaluation.suites import left_out, select
from megatron_prolong.evaluation.task import Inputs, Task


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def shorter_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    short_documents(monkeypatch)


@pytest.fixture
def inputs(data: Path, tokenizer: Any) -> Inputs:
    return Inputs(data, tokenizer, max_samples=2)


def only(name: str, length: int = 8192) -> Task:
    (task,) = select("helmet", [length], [name])
    return task


def test_every_task_of_helmet_runs_and_is_averaged(inputs: Inputs, tmp_path: Path) -> None:
    tasks = [task for task in select("helmet", [8192]) if not task.name.startswith("ruler_niah_mk")]
    assert len(tasks) == 19 and len(select("helmet", [8192])) == 21
    entails = lambda passage, claim: "fact 1" in passage  # noqa: E731
    results = run_suite(tasks, Parrot(inputs.tokenizer), inputs, Settings(), tmp_path / "a", entails)
    found = {one.category: one for one in averages(results)}
    overall = found.pop("mean")
    assert set(found) == {"recall", "rag", "rerank", "icl", "longqa", "summ", "cite"}
    assert overall.score == pytest.approx(sum(one.score for one in found.values()) / 7)
    assert {name for name, one in found.items() if one.partial} == {"longqa", "summ"}, "no judge was asked"
    assert overall.partial
    content = json.loads(results[0].path.read_text())
    assert {"args", "data", "metrics", "averaged_metrics", "throughput"} <= content.keys()
    models = {"a": read_results(tmp_path / "a"), "b": results}
    assert all(one.interval is not None and one.interval.mean == 0 for one in changes(models))
    print_suite(models, "helmet")
    plot_suite(models, "helmet", tmp_path / "suite.png")
    page = suite_page(models, "helmet", tmp_path / "suite.png")
    assert all(one.name in page for one in results) and "data:image/png;base64," in page
    assert json.dumps(summary(models, "helmet"), default=vars)


def test_recall_prompt_is_helmets(inputs: Inputs) -> None:
    task = only("json_kv")
    row = task.load(task, inputs)[0]
    text = render(task, row, chat=False).text
    assert text.startswith('JSON data:\n{\n    "key-')
    assert (
        "}\n\n\nExtract the value corresponding to the specified key in the JSON object below.\n\nKey: key-"
        in text
    )
    assert text.endswith(f"\n\nKey: {row['question']}\nCorresponding value:")
    assert text.count("\nCorresponding value: value-") == 2


def test_the_answers_first_words_count_where_the_prompt_gives_them(inputs: Inputs, tmp_path: Path) -> None:
    task = only("json_kv")
    for chat in ("never", "always"):
        path = run_task(task, Parrot(inputs.tokenizer), inputs, Settings(chat=chat), tmp_path).path
        content = json.loads(path.read_text())
        outputs = [item["output"] for item in content["data"]]
        begun = [output.startswith("Corresponding value: fact 1") for output in outputs]
        assert begun == [chat == "never"] * 2
        averages, rows = content["averaged_metrics"], content["metrics"]
        assert averages["input_len"] == pytest.approx(sum(rows["input_len"]) / 2)
        assert averages["rougeL_recall"] == pytest.approx(100 * sum(rows["rougeL_recall"]) / 2)


def test_rag_depths_share_demonstrations_and_questions_are_whole(inputs: Inputs) -> None:
    task = only("kilt_nq")
    rows = task.load(task, inputs)
    assert len(rows) == 4 and len({row["question"] for row in rows}) == 2
    assert rows[0]["demos"] == rows[1]["demos"] and rows[0]["demos"].count("Question: train") == 2
    assert "Document (Title: T" in render(task, rows[0], chat=False).text


def test_of_a_large_file_only_the_asked_rows_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(
            json.dumps({"question": f"ä{n // 2}", "text": "x" * 20_000}) + "\r\n\n" for n in range(500)
        )
    tracemalloc.start()
    rows = read_chosen(path, lambda row: row["question"], lambda names: sorted(names)[-2:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["question"] for row in rows] == ["ä98", "ä98", "ä99", "ä99"]
    assert peak < 1 << 20, "the file has ten times as much"


def test_popqa_asks_rare_subjects_and_never_shows_the_asked(inputs: Inputs) -> None:
    task = only("kilt_popqa_3")
    for row in task.load(task, inputs):
        assert row["s_pop"] < 1000
        assert f"Question: {row['question']}\n" not in row["demos"]


def test_icl_maps_labels_to_numbers_of_each_question(inputs: Inputs) -> None:
    task = only("icl_trec_coarse")
    rows = task.load(task, inputs)
    assert render(task, rows[0], chat=False).text.startswith(
        'Use the provided mapping from the text to label to assign a label to the text. Only output "label: '
        '{label}" and nothing else. \n\n'
    )
    for row in rows:
        lines = row["context"].split("\n\n")
        assert len(lines) == 400
        mapping = {}
        for line in lines:
            text, label = line.split("\nlabel: ")
            mapping.setdefault(int(text.rsplit(" ", 1)[1]) % 3, set()).add(label)
        assert all(len(numbers) == 1 for numbers in mapping.values())
        labels = [line.split("\nlabel: ")[1] for line in lines]
        assert all(len(set(labels[start : start + 3])) == 3 for start in range(0, 399, 3)), "not balanced"
        assert {row["answer"]} == mapping[row["coarse_label"]]


def test_rerank_gold_and_scores(inputs: Inputs) -> None:
    task = only("msmarco")
    row = task.load(task, inputs)[0]
    assert task.score(f"Ranking: {row['answer']}", row).scores["NDCG@5"] == 1.0
    assert "relelvant" in task.template and "[ID: " in row["context"]
    assert f"Query: {row['question']}\n" not in row["demos"]


def test_long_documents_are_cut_and_say_so(inputs: Inputs) -> None:
    task = only("narrativeqa")
    (row, *_) = task.load(task, inputs)
    assert row["context"].endswith(" ... [the rest of the text is omitted]") and "document" not in row
    assert abs(len(inputs.tokenizer(row["context"])["input_ids"]) - 7892) < 40


@pytest.mark.parametrize("name", ["narrativeqa", "infbench_qa", "infbench_sum", "multi_lexsum"])
def test_a_document_is_tokenized_once_for_all_its_questions(inputs: Inputs, name: str) -> None:
    seen: list[str] = []

    class Counting:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(text)
            return inputs.tokenizer(text, **options)

    task = only(name)
    rows = task.load(task, replace(inputs, tokenizer=Counting()))
    assert len(rows) == 2 and [len(text) > 10_000 for text in seen].count(True) == 1


def test_books_are_demonstrated_by_their_summaries(inputs: Inputs) -> None:
    task = only("infbench_sum")
    row = task.load(task, inputs)[0]
    assert row["demo"].count("[story text]\nSummary: because") == 2
    assert row["keypoints"] == ["a", "b"], "for the judge"


def test_truncation_keeps_the_question_and_is_counted(inputs: Inputs, tmp_path: Path) -> None:
    task = only("json_kv")
    row = task.load(task, inputs)[0]
    whole = encode(inputs.tokenizer, render(task, row, chat=False))
    cut = prepare(task, row, False, inputs.tokenizer, len(whole) + task.max_new_tokens - 7)
    assert cut.removed_tokens == 7 and abs(len(cut.ids) - (len(whole) - 7)) <= 2
    assert cut.prompt.text.endswith(f"Key: {row['question']}\nCorresponding value:")
    just = prepare(task, row, False, inputs.tokenizer, len(whole) + task.max_new_tokens)
    assert (just.removed_tokens, just.ids) == (0, whole)
    with pytest.raises(UserError, match="alone take more"):
        prepare(task, row, False, inputs.tokenizer, task.max_new_tokens + 1)
    for length, cut_rows in ((len(whole) + task.max_new_tokens - 20, 2), (8192, 0)):
        asked = replace(task, length=length)
        assert run_task(asked, Parrot(inputs.tokenizer), inputs, Settings(), tmp_path).truncated == cut_rows


def test_a_stopped_run_continues_and_equals_an_unstopped_one(inputs: Inputs, tmp_path: Path) -> None:
    task = only("kilt_nq")
    with pytest.raises(KeyboardInterrupt):
        run_task(task, Parrot(inputs.tokenizer, lives=2), inputs, Settings(), tmp_path / "stopped")
    (unfinished,) = (tmp_path / "stopped").iterdir()
    unfinished.write_text(unfinished.read_text()[:-40])  # as a crash while writing leaves it
    second = Parrot(inputs.tokenizer)
    result = run_task(task, second, inputs, Settings(), tmp_path / "stopped")
    assert len(second.seen) == 3, "one line of two was whole"
    straight = run_task(task, Parrot(inputs.tokenizer), inputs, Settings(), tmp_path / "straight")
    assert json.loads(result.path.read_text())["data"] == json.loads(straight.path.read_text())["data"]
    assert {path.suffix for path in (tmp_path / "stopped").iterdir()} == {".json", ".score"}
    third = Parrot(inputs.tokenizer)
    run_task(task, third, inputs, Settings(), tmp_path / "stopped")
    assert not third.seen, "a finished task is read"
    run_task(task, third, inputs, Settings(model_identity="retrained"), tmp_path / "stopped")
    assert len(third.seen) == 4, "another model in the same place is run"


def test_the_same_run_twice_at_once_ends_well_for_both(inputs: Inputs, tmp_path: Path) -> None:
    class Slower(Parrot):
        def generate(
            self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
        ) -> list[str]:
            run_task(task, Parrot(inputs.tokenizer), inputs, Settings(), tmp_path)
            return super().generate(prompts, max_new_tokens, stop)

    task = only("kilt_nq")
    assert len(run_task(task, Slower(inputs.tokenizer), inputs, Settings(), tmp_path).values) == 4


def test_half_a_result_is_named(inputs: Inputs, tmp_path: Path) -> None:
    """As a copy that broke off leaves it."""
    task, parrot = only("kilt_nq"), Parrot(inputs.tokenizer)
    path = run_task(task, parrot, inputs, Settings(), tmp_path).path
    path.write_text(path.read_text()[:100])
    for read in (
        lambda: run_task(task, parrot, inputs, Settings(), tmp_path),
        lambda: read_results(tmp_path),
    ):
        with pytest.raises(UserError, match=f"{path.name}: cannot be read as JSON"):
            read()


def test_a_result_of_other_settings_is_not_taken_for_this_one(inputs: Inputs, tmp_path: Path) -> None:
    task = only("kilt_nq")
    run_task(task, Parrot(inputs.tokenizer), inputs, Settings(model_identity="x"), tmp_path)
    for changed in (
        Settings(stop_newline=True, model_identity="x"),
        Settings(too_long="allow", model_identity="x"),
    ):
        parrot = Parrot(inputs.tokenizer, max_length=8192 if changed.stop_newline else 8000)
        run_task(task, parrot, inputs, changed, tmp_path)
        assert len(parrot.seen) == 4, changed
        assert parrot.stop == (("\n",) if changed.stop_newline else ())
        run_task(task, replace(parrot, model="moved"), inputs, changed, tmp_path)
        assert len(parrot.seen) == 4, "the same model in another place is known"


def test_a_result_of_other_data_is_not_taken_for_this_one(inputs: Inputs, data: Path, tmp_path: Path) -> None:
    task, parrot = only("kilt_nq"), Parrot(inputs.tokenizer)
    copied = shutil.copytree(data, tmp_path / "data")
    run_task(task, parrot, inputs, Settings(), tmp_path / "out")
    run_task(task, parrot, replace(inputs, data=copied), Settings(), tmp_path / "out")
    assert len(parrot.seen) == 4, "the same data in another place is known"
    (copied / task.demo_file).write_text((copied / task.demo_file).read_text() + "\n")
    run_task(task, parrot, replace(inputs, data=copied), Settings(), tmp_path / "out")
    assert len(parrot.seen) == 8


def test_citations_are_scored_later_without_asking_again(inputs: Inputs, tmp_path: Path) -> None:
    task, parrot = only("alce_asqa"), Parrot(inputs.tokenizer)
    assert run_task(task, parrot, inputs, Settings(), tmp_path).missing == ("citation_rec", "citation_prec")
    entails = lambda passage, claim: "fact 0" in passage  # noqa: E731
    later = run_task(task, parrot, inputs, Settings(), tmp_path, entails)
    assert len(parrot.seen) == 2 and not later.missing
    straight = run_task(task, parrot, inputs, Settings(), tmp_path / "straight", entails)
    assert later.scores == straight.scores and later.scores["citation_rec"] > 0


def test_a_judgement_goes_with_the_answers_it_was_of(inputs: Inputs, tmp_path: Path) -> None:
    task = only("narrativeqa")
    path = run_task(task, Parrot(inputs.tokenizer), inputs, Settings(), tmp_path).path
    content = json.loads(path.read_text())
    assert len(content["data"]) == 2
    content["averaged_metrics"]["gpt-4-score"] = 3.0
    content["data"][0]["gpt-4-scores"] = {"fluency": 1, "correctness": 3}
    content["data"][1]["gpt-4-scores"] = None  # unreadable: neither in the mean nor in its interval
    judged_path(path).write_text(json.dumps(content))
    (judged,) = read_results(tmp_path)
    assert judged.score == judged.interval.mean == 100.0
    again = run_task(task, Parrot(inputs.tokenizer), inputs, Settings(model_identity="retrained"), tmp_path)
    assert again.missing == ("gpt-4-score",) and not judged_path(path).exists()
    by_another = replace(judged, settings={**judged.settings, "judge": "another"})
    for other in (again, by_another):
        (change,) = changes({"judged": [judged], "other": [other]})
        assert change.interval is None
    assert notes({"judged": [judged], "by another": [by_another]}, None)[-1] == (
        "by another against judged: judge another (not None), so no change is given: narrativeqa_7892"
    )


def test_prompts_beyond_the_model_are_refused_cut_or_allowed(inputs: Inputs, tmp_path: Path) -> None:
    task = only("kilt_nq")
    lengths = [len(encode(inputs.tokenizer, render(task, row, False))) for row in task.load(task, inputs)]
    short = Parrot(inputs.tokenizer, max_length=min(lengths) + task.max_new_tokens - 5)
    with pytest.raises(UserError, match="--too-long allow"):
        run_task(task, short, inputs, Settings(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_task(task, replace(short, lives=2), inputs, Settings(too_long="truncate"), tmp_path)
    assert run_task(task, short, inputs, Settings(too_long="allow"), tmp_path).truncated == 0, (
        "not those cut before"
    )
    cut = run_task(task, short, inputs, Settings(too_long="truncate"), tmp_path)
    assert cut.truncated > 0
    assert run_task(task, short, inputs, Settings(too_long="allow"), tmp_path).truncated == 0


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_splits_of_the_hub_are_read_by_column(form: str, tmp_path: Path) -> None:
    """NarrativeQA's training stories, which no prompt shows, are ten gigabytes."""
    datasets = pytest.importorskip("datasets", reason="pip install megatron-prolong[eval]")
    rows = [{"story": "long", "question": {"text": f"q{n}"}} for n in range(3)]
    split = datasets.Dataset.from_list(rows)
    if form == "parquet":
        split.to_parquet(tmp_path / "train-0000.parquet")
    else:
        split.save_to_disk(tmp_path / "train")
    assert read_split(tmp_path, "train") == rows
    assert read_split(tmp_path, "train", ["question"]) == [{"question": row["question"]} for row in rows]


def test_a_story_of_several_questions_is_kept_once(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install megatron-prolong[eval]")
    rows = [{"document": {"text": "a long story" if n % 2 else "two"}, "n": n} for n in range(100)]
    for part in range(2):
        datasets.Dataset.from_list(rows[50 * part : 50 * part + 50]).to_parquet(
            tmp_path / f"test-{part}.parquet"
        )
    found = read_split(tmp_path, "test")
    assert found == rows
    assert len({id(row["document"]["text"]) for row in found}) == 2


def test_missing_data_is_listed_with_commands(tokenizer: Any, tmp_path: Path) -> None:
    tasks = select("helmet", [8192], ["rag", "recall"])
    with pytest.raises(UserError, match=r"data\.tar\.gz"):
        runnable(tasks, tmp_path, skip_missing=False)
    assert {task.category for task in runnable(tasks, tmp_path, skip_missing=True)} == {"recall"}
    for chosen in (tasks, select("synthetic", [8192])):
        with pytest.raises(UserError, match="mistyped: no such directory"):
            runnable(chosen, tmp_path / "mistyped", skip_missing=True)  # and not generated instead


def test_what_a_length_has_no_data_of_is_told() -> None:
    assert left_out("helmet", [8192, 131072]) == left_out("synthetic", [8000]) == []
    (line,) = left_out("helmet", [8000, 8192])
    assert line.startswith("suite helmet has no rag, rerank, icl, cite at 8000,")
    assert left_out("helmet", [8000], ["recall", "summ"]) == []
    assert left_out("helmet", [8000, 8192], ["rag", "recall"])[0].startswith(
        "suite helmet has no rag at 8000"
    )


def test_prolong_is_a_subset_of_helmet() -> None:
    names = {task.name for task in select("prolong", [32768])}
    assert names < {task.name for task in select("helmet", [32768])}
    assert len(names) == 1 + 3 + 1 + 5 + 1 + 1


def test_file_names_are_helmets(inputs: Inputs, tmp_path: Path) -> None:
    result = run_task(
        only("json_kv"), Parrot(inputs.tokenizer), replace(inputs, max_samples=None), Settings(), tmp_path
    )
    assert result.path.name == (
        "json_kv_v1_test_k105_dep6_in8192_size100_shots2_sampFalsemax100min0t0.0p1.0_chatFalse_42.json"
    )
    assert result.path.with_name(result.path.name + ".score").exists()
    assert only("ruler_niah_mv").shots == 2 and {task.shots for task in select("ruler", [8192])} == {0}


def test_published_scores_stand_beside_ones_own(inputs: Inputs, tmp_path: Path) -> None:
    results = [
        replace(run_task(only(name), Parrot(inputs.tokenizer), inputs, Settings(), tmp_path), length=131072)
        for name in ("kilt_nq", "json_kv")
    ]
    table = grids({"ours": results}, "helmet")[0]
    rows = [[cell.rstrip("†") for cell in row] for row in table.rows]  # HELMET has more tasks than these
    rag, recall, mean = (dict(zip(table.headings, row, strict=True)) for row in rows)
    assert rag["length"] == "128K" and float(rag["ours"]) == round(results[0].score, 1)
    assert (rag["ProLong-8B (published)"], rag["Llama-3.1-8B-Instruct (published)"]) == ("63.2", "59.5")
    assert (mean["category"], mean["ProLong-8B (published)"]) == ("mean", "81.0"), "of 98.8 and 63.2"
    assert float(mean["ours"]) == pytest.approx((float(rag["ours"]) + float(recall["ours"])) / 2, abs=0.11)


def test_a_result_without_its_fields_is_named_and_one_without_settings_is_made_again(
    inputs: Inputs, tmp_path: Path
) -> None:
    task, parrot = only("json_kv"), Parrot(inputs.tokenizer)
    path = run_task(task, parrot, inputs, Settings(), tmp_path).path
    content = json.loads(path.read_text())
    del content["data"][0]["removed_tokens"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{path.name}: not a whole result .* 'removed_tokens'"):
        read_results(tmp_path)
    path.write_text("{}")
    assert run_task(task, parrot, inputs, Settings(), tmp_path).path == path
    assert read_results(tmp_path)


def test_data_without_an_example_is_named(tokenizer: Any, tmp_path: Path) -> None:
    task = only("json_kv")
    (tmp_path / task.test_file).parent.mkdir()
    (tmp_path / task.test_file).write_text("")
    with pytest.raises(UserError, match="json_kv: its data holds no example"):
        run_task(task, Parrot(tokenizer), Inputs(tmp_path, tokenizer), Settings(), tmp_path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("json_kv", "[1]"),
        ("json_kv", "{}"),
        ("json_kv", '{"num_kvs": 3, "demos": [], "context": "", "question": "k"}'),
        (
            "ruler_niah_mk_2",
            '{"context": "", "query": "k", "question": "", "type_needle_v": "numbers", "outputs": []}',
        ),
    ],
)
def test_data_that_is_not_helmets_is_named(tokenizer: Any, tmp_path: Path, name: str, line: str) -> None:
    """The last two lack an answer, which only the score asks for: what was generated by then is kept."""
    task = only(name)
    file = tmp_path / task.test_file
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=rf"{name}: its data is not as HELMET has it .*{file.name}"):
        run_task(task, Parrot(tokenizer), Inputs(tmp_path, tokenizer), Settings(), tmp_path)
    assert len(list(tmp_path.glob("*.partial.jsonl"))) == (1 if "question" in line else 0)


def test_data_that_other_libraries_cannot_read_is_named(tokenizer: Any, tmp_path: Path) -> None:
    """A Parquet file with a hole in it, and a folder of save_to_disk's without its files."""
    datasets = pytest.importorskip("datasets", reason="pip install megatron-prolong[eval]")
    (task,) = select("helmet", [8192], ["trec_coarse"])
    folder = tmp_path / "hf" / "trec"
    folder.mkdir(parents=True)
    rows = [{"text": "a", "coarse_label": 0}, {"text": "b", "coarse_label": 1}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-0.parquet")
    content = (folder / "train-0.parquet").read_bytes()
    inputs = Inputs(tmp_path, tokenizer)
    (folder / "train-0.parquet").write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(UserError, match=rf"(?s)its data is not as HELMET has it .*get {folder} anew"):
        run_task(task, Parrot(tokenizer), inputs, Settings(), tmp_path)
    (folder / "train-0.parquet").unlink()
    (folder / "train").mkdir()
    (folder / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=rf"(?s)its data is not as HELMET has it .*get {folder} anew"):
        run_task(task, Parrot(tokenizer), inputs, Settings(), tmp_path)
