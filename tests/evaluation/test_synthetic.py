"""Generated tasks: right answers in the text, within the length, the same for the same seed."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from stand_ins import Parrot
from typer.testing import CliRunner

from megatron_prolong.cli.eval import _depths
from megatron_prolong.cli.main import app
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, ScoringBackend, encode
from megatron_prolong.evaluation.documents import check_documents, read_passages
from megatron_prolong.evaluation.needle import NOISE, NeedleCell, _numbers, make_needle, sentences_of
from megatron_prolong.evaluation.needle import run as run_needle
from megatron_prolong.evaluation.prompts import prepare, render
from megatron_prolong.evaluation.results import read_arguments
from megatron_prolong.evaluation.run import Settings, run_task
from megatron_prolong.evaluation.sentences import split_sentences
from megatron_prolong.evaluation.suite import runnable
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.synthetic.size import fitting_rows, largest_fit
from megatron_prolong.evaluation.task import Inputs, Task
from megatron_prolong.evaluation.tasks import recall

PROSE = "It rained all day. The harbour was empty! Who would sail in this weather? Nobody did. " * 50
MADE = [task.name for task in [*select("synthetic", [8192]), *select("ruler", [8192])] if task.generated]


def load(name: str, length: int, inputs: Inputs) -> tuple[Task, list[dict[str, Any]]]:
    suite = "synthetic" if name == "json_kv" else "ruler"
    (task,) = [one for one in select(suite, [length]) if one.name == name]
    return task, task.load(task, inputs)


@pytest.mark.parametrize("name", sorted(set(MADE)))
def test_prompts_fill_the_length_and_hold_their_answers(name: str, tokenizer: Any) -> None:
    inputs = Inputs(None, tokenizer, max_samples=3, haystack=PROSE)
    task, rows = load(name, 8192, inputs)
    assert len(rows) == 3
    for row in rows:
        tokens = len(encode(tokenizer, render(task, row, chat=False)))
        assert 0.85 * 8192 < tokens <= 8192 - task.max_new_tokens
        answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        assert all(answer in row["context"] for answer in answers)
        assert len(set(answers)) == len(answers)
    again = load(name, 8192, inputs)[1]
    assert again == rows
    assert load(name, 8192, Inputs(None, tokenizer, seed=7, max_samples=3, haystack=PROSE))[1] != rows


@pytest.mark.parametrize("name", ["json_kv", "ruler_niah_mk_3", "ruler_cwe"])
def test_a_chat_template_finds_room_and_changes_no_question(name: str, tokenizer: Any) -> None:
    """With --chat always JSON-KV lost the last pair's value, at which every sixth question is."""
    long = copy.deepcopy(tokenizer)
    long.chat_template = (
        "Cutting Knowledge Date: December 2023. Today Date: 26 Jul 2024" + tokenizer.chat_template
    )
    task, rows = load(name, 4000, Inputs(None, long, max_samples=6))
    for row in rows:
        for chat in (False, True):
            assert prepare(task, row, chat, long, 4000).removed_tokens == 0
    for template in ("{{ raise_exception('no chats') }}", None):
        long.chat_template = template
        assert len(load(name, 4000, Inputs(None, long, max_samples=1))[1]) == 1


def test_key_value_depths_are_even_and_share_their_object(tokenizer: Any) -> None:
    _, rows = load("json_kv", 4096, Inputs(None, tokenizer, max_samples=6))
    rows.sort(key=lambda row: row["depth"])
    places = [
        list(json.loads(row["context"].removeprefix("JSON data:\n"))).index(row["question"]) for row in rows
    ]
    last = rows[0]["num_kvs"] - 1
    assert places == [round(depth * last / 5) for depth in range(6)]
    assert len({row["question"] for row in rows}) == 1


def test_pairs_are_as_many_as_helmets_where_they_fit(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "encode", lambda _, prompt: prompt.text.split())
    inputs = Inputs(None, tokenizer, max_samples=1)
    assert [load("json_kv", length, inputs)[1][0]["num_kvs"] for length in (4096, 8192)] == [50, 105]
    assert 2300 < load("json_kv", 5000, inputs)[1][0]["num_kvs"] < 2450, "HELMET has none: two words a pair"


def test_needles_are_asked_for_rightly(tokenizer: Any) -> None:
    inputs = Inputs(None, tokenizer, max_samples=2, haystack=PROSE)
    for name, count, kind in (
        ("ruler_niah_mv", 4, "numbers"),
        ("ruler_niah_mq", 4, "numbers"),
        ("ruler_niah_s_3", 1, "uuid"),
    ):
        task, rows = load(name, 4096, inputs)
        assert len(rows[0]["answer"]) == count and rows[0]["type_needle_v"] == kind
        for answer in rows[0]["answer"]:
            (line,) = [part for part in rows[0]["context"].split("One of the special") if answer in part]
            key = line.split(" for ")[1].split(" is: ")[0]
            assert key in rows[0]["query"]
        assert ("What are all" in task.template) == (count > 1)


def test_chains_of_variables_lead_to_the_value(tokenizer: Any) -> None:
    _, rows = load("ruler_vt", 4096, Inputs(None, tokenizer, max_samples=2))
    for row in rows:
        names = row["answer"]
        steps = [f"VAR {names[0]} = {row['query']}"]
        steps += [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(names)]
        places = [row["context"].index(step) for step in steps]
        assert places == sorted(places) and len(names) == 5
        assert row["example"].count("VAR ") == 9
        assert row["example"] == row["example"].rstrip() + "\n\n", "RULER's distance to the question"


def test_common_and_frequent_words_are_the_most_frequent(tokenizer: Any) -> None:
    inputs = Inputs(None, tokenizer, max_samples=2)
    _, common = load("ruler_cwe", 16384, inputs)
    counts = Counter(common[0]["context"].split()[1::2])
    assert {word for word, _ in counts.most_common(10)} == set(common[0]["answer"])
    assert {counts[word] for word in common[0]["answer"]} == {30}
    _, frequent = load("ruler_fwe", 8192, inputs)
    ranked = [word for word, _ in Counter(frequent[0]["context"].split()).most_common(4)]
    assert ranked[0] == "..." and ranked[1:] == frequent[0]["answer"]


def test_questions_over_documents(tokenizer: Any, tmp_path: Path) -> None:
    paragraphs = [
        {
            "context": f"Paragraph {n} says {n * 7}.",
            "qas": [
                {"question": f"What says {n}?", "answers": [{"text": str(n * 7)}], "is_impossible": False}
            ],
        }
        for n in range(30)
    ]
    (tmp_path / "ruler_source").mkdir()
    (tmp_path / "ruler_source/squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    inputs = Inputs(tmp_path, tokenizer, max_samples=3)
    task, rows = load("ruler_qa_1", 1024, inputs)
    for row in rows:
        assert f" says {row['answer'][0]}." in row["context"]
        assert len(encode(tokenizer, render(task, row, chat=False))) <= 1024 - 128
        assert row["context"].startswith("Document 1:\nParagraph ")
    arguments = read_arguments(run_task(task, Parrot(tokenizer), inputs, Settings(), tmp_path).path)
    assert arguments["generated"] and not arguments["test_files"], "made here, of published questions"


@pytest.mark.parametrize("limit", [11, 99, 1000, 123457])
def test_the_largest_fit_fits_and_one_more_does_not(limit: int) -> None:
    calls = []

    def count(units: int) -> int:
        calls.append(units)
        return 3 + 7 * units + units % 3

    units = largest_fit(count, limit)
    assert len(calls) <= 12
    assert count(units) <= limit < count(units + 1)


def test_a_row_that_cannot_shrink_is_left_to_be_cut() -> None:
    rows = fitting_rows(
        lambda count, index: {"tokens": count + 100 * index}, lambda row: row["tokens"], 50, 2
    )
    assert [row["tokens"] for row in rows] == [50, 101]


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(UserError, match="longer"):
        largest_fit(lambda units: 100 * units, 99)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(depth: float, tokenizer: Any) -> None:
    needle = make_needle(tokenizer, NOISE, 2000, depth, seed=3)
    tokens = len(encode(tokenizer, needle.prompt))
    assert 2000 - 16 - 24 < tokens <= 2000 - 16
    place = needle.prompt.text.index(needle.value) / len(needle.prompt.text)
    assert abs(place - (0.1 + 0.75 * depth)) < 0.12
    sizes = {len(tokenizer(f" {value}")["input_ids"]) for value in (needle.value, *needle.distractors)}
    assert len(sizes) == 1 and needle.value not in needle.distractors


def test_sentences_end_once_and_dots_alone_are_text(tokenizer: Any) -> None:
    assert sentences_of("One.  Is it\ntwo? Three.") == ("One.", "Is it two?", "Three.")
    assert ".." not in make_needle(tokenizer, NOISE, 2000, 0.5, seed=3).prompt.text
    assert ". . . " in make_needle(tokenizer, ". . .", 2000, 0.5, seed=3).prompt.text


class Finder:
    """Repeats every other number, and finds it one nat likelier than the likeliest other, or as likely."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        found = [re.findall(r"is (\d{7})\.", prompt.text) for prompt in prompts]
        assert all(len(numbers) == 1 for numbers in found)
        return ["".join(numbers) if index % 2 else "none" for index, numbers in enumerate(found)]

    def continuation_logprobs(
        self, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
    ) -> list[list[float]]:
        return [self._one(*question) for question in questions]

    def _one(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        text = self.tokenizer.decode(ids)
        self.prompts.append(text)
        right, *wrong = (self.tokenizer.decode(each).strip() for each in continuations)
        assert right in text and len(wrong) == 9 and not any(number in text for number in wrong)
        return [-1.0 if len(self.prompts) % 2 else -2.0, *[-9.0] * 4, -2.0, *[-9.0] * 4]


def test_needles_are_scored_over_the_trials_of_each_cell(tokenizer: Any) -> None:
    model = Finder(tokenizer)
    cells = run_needle(cast(ScoringBackend, model), NOISE, [512, 1024], [0.0, 1.0], trials=2, seed=5)
    assert cells == [
        NeedleCell(length, depth, trials=2, recall=0.5, ranked_first=0.5, margin=(1 + 0) / 2)
        for length in (512, 1024)
        for depth in (0.0, 1.0)
    ]
    assert len(set(model.prompts)) == 8, "another needle in every trial"
    assert len({prompt.split("\n")[1][:10] for prompt in model.prompts}) > 2, "and another part of the text"


def test_a_depth_given_twice_is_measured_once() -> None:
    assert _depths("50,0,50.0,100") == [0.0, 0.5, 1.0]


def test_numbers_of_another_length_in_tokens_are_no_distractors() -> None:
    def without_nines(text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": list(text.replace("9", ""))}

    for seed in range(5):
        value, distractors = _numbers(without_nines, random.Random(seed))
        assert {number.count("9") for number in distractors} == {value.count("9")}


def test_a_length_without_its_k_is_refused_before_any_model_is_opened(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"ruler_niah_s_1 at a length of 16 tokens: .* \(16K is 16,384\)"):
        runnable(select("synthetic", [16, 1024], ["niah"]), None, skip_missing=True)
    with pytest.raises(
        UserError, match=r"needle at a length of 64 tokens: .* it takes \d+; .* \(64K is 65,536\)"
    ):
        make_needle(tokenizer, NOISE, 64, 0.5, seed=3)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_data", "no such file or directory"),
        ("records.jsonl", "line at byte 0: no text in the field text; it has words (str)"),
        ("records.jsonl.gz", "cannot be read to its end (Not a gzipped file"),
    ],
)
def test_documents_that_are_not_there_or_no_text_are_told_before_the_model_is_opened(
    tmp_path: Path, name: str, problem: str
) -> None:
    if name != "no_data":
        (tmp_path / name).write_text('{"words": "a record"}')
    arguments = ["perplexity", str(tmp_path / "no_model"), "--data", str(tmp_path / name), "--out", "out"]
    found = CliRunner().invoke(app, ["eval", *arguments])
    assert isinstance(found.exception, UserError) and f"{name}" in str(found.exception)
    assert problem in str(found.exception)


def test_packs_of_another_tokenizer_are_refused_before_the_model_is_opened(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    with MDSWriter(tmp_path / "packs", {"input_ids": "ndarray:uint32"}, tokenizer="0123456789abcdef"):
        pass
    with pytest.raises(UserError, match=r"packs and .*model are of different tokenizers"):
        check_documents([tmp_path], [str(tmp_path / "model")])


def test_only_the_chosen_passages_are_in_memory(tmp_path: Path) -> None:
    """A data set of billions of tokens has more documents of a length than fit."""
    with MDSWriter(tmp_path / "packs", {"input_ids": "ndarray:uint32"}) as writer:
        for number in range(64):
            writer.write({"input_ids": np.full(1 << 14, number, np.uint32)})
    tracemalloc.start()
    passages = read_passages([tmp_path], None, 1 << 14, 2, seed=42)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [passage.tokens[0] for passage in passages] == [29, 42]
    assert passages[1].name.endswith("sample 42, document 0")
    assert peak_bytes < 16 * 8 * (1 << 14)  # all of them: 64


def test_sentences_without_nltk_data_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"nltk\.downloader punkt_tab"):
        split_sentences("One. Two.")


def test_unknown_suites_and_tasks_are_refused_also_beside_known_ones() -> None:
    assert [task.name for task in select("synthetic", [1024], ["recall"])] == ["json_kv"]
    for name in ("synthetics", "short"):  # whose scores `run` shows beside each other
        refused = CliRunner().invoke(app, ["eval", "compare", "results", "--suite", name])
        assert str(refused.exception).startswith(f"--suite {name}: must be one of helmet, ruler")
    for name in ("synthetics", "none"):
        for command in (["run", "model", "--out", "results"], ["data", "check"]):
            refused = CliRunner().invoke(app, ["eval", *command, "--suite", name])
            assert str(refused.exception).startswith(f"--suite {name}: must be one of helmet, ruler")
    with pytest.raises(UserError, match="suite synthetic has no task nothing at 1K; it has json_kv, ruler_"):
        select("synthetic", [1024], ["json_kv", "nothing"])


def test_what_no_archive_holds_is_not_fetched_from_one(tmp_path: Path) -> None:
    for length, there in ((8192, "data.tar.gz"), (2000, "squad.json .*/ruler_source/, .*RULER's")):
        with pytest.raises(UserError, match=there) as caught:
            runnable(select("ruler", [length], ["qa_1"]), tmp_path, skip_missing=False)
        assert ("11 GB" in str(caught.value)) == (length == 8192)
    own = tmp_path / "ruler/qa_1/validation_2000.jsonl"
    own.parent.mkdir(parents=True)
    own.touch()
    assert runnable(select("ruler", [2000], ["qa_1"]), tmp_path, skip_missing=False)


def test_files_with_one_remedy_share_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runnable(select("helmet", [8192], ["kilt"]), tmp_path, skip_missing=False)
    assert str(caught.value).count("data.tar.gz  # 11 GB") == 1
    assert "kilt/nq-dev-multikilt_1000_k50_dep6.jsonl, " in str(caught.value)
