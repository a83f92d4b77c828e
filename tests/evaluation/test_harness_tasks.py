"""`prolong eval lm-eval` beside lm-evaluation-harness's own model of transformers; no task needs the network."""

from __future__ import annotations

import copy
import errno
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from own_tasks import write_tasks
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import harness_tasks
from megatron_prolong.evaluation.harness_tasks import (
    Questions,
    _write_answers,
    print_questions,
    rows_of,
    run_questions,
)
from megatron_prolong.evaluation.hf import HuggingFaceBackend
from megatron_prolong.evaluation.identity import tasks_identity

LONGER_THAN_THE_MODEL = "The key is mentioned in the text. " * 150  # of 1,024 tokens
TASKS = {
    "own_choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["the key", "in text", "a b"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_greedy": """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{continued}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "own_answer": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continued}}"
num_fewshot: 1
generation_kwargs: {until: ["x", "z"], max_new_tokens: 6}
metric_list: [{metric: exact_match}]
""",
    "own_prefilled": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continued}}"
gen_prefix: "The"
generation_kwargs: {until: ["x"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "own_text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{continued}}"
metric_list: [{metric: bits_per_byte}]
""",
}
GROUP = "group: own\ntask: [own_choice, own_greedy]\naggregate_metric_list: [{metric: acc}]\n"


@pytest.fixture(scope="module")
def model(hf_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer begins texts with BOS, as Llama's does, and so does its chat template."""
    directory = tmp_path_factory.mktemp("bos") / "tiny"
    module = AutoModelForCausalLM.from_pretrained(hf_directory)
    module.generation_config.eos_token_id = 1
    module.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(hf_directory)
    inner: Tokenizer = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.chat_template = (
        "<bos>{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory)("The")["input_ids"][0] == 0
    return directory


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a checkpoint of ours."""
    target = tmp_path_factory.mktemp("trained") / "ours"
    to_megatron(model, target, None)
    return target


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks; every other question goes on as the model itself would."""
    directory = tmp_path_factory.mktemp("own")
    tokenizer, module = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rows = [{"question": LONGER_THAN_THE_MODEL, "continued": " the key", "label": 0}]
    for number in range(1000):
        question = f"The magic number {number} is"
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            continued = module.generate(ids, max_new_tokens=1 + number % 2, do_sample=False)[0].tolist()
        text = tokenizer.decode(continued[ids.shape[1] :])
        if tokenizer(question + text)["input_ids"] == continued and text.strip() == text:
            rows += [
                {"question": question, "continued": text, "label": number % 3},
                {"question": f"{question} {number}", "continued": " the key", "label": 1},
            ]
        if len(rows) == 9:
            break
    write_tasks(directory, TASKS, rows)
    (directory / "group.yaml").write_text(GROUP)
    return directory


@pytest.fixture(autouse=True)
def offline_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own 15,000 tasks are not read."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def ask(model: Path, own: Path, out: Path, *more: str) -> Any:
    command = ["eval", "lm-eval", f"tiny={model}", "--include", str(own), "--out", str(out), *more]
    return CliRunner().invoke(app, command)


@pytest.mark.parametrize(("chat", "num_fewshot"), [(False, None), (True, None), (False, 0)])
def test_scores_and_answers_are_the_harness_s_own(
    chat: bool, num_fewshot: int | None, model: Path, trained: Path, own: Path, tmp_path: Path
) -> None:
    """A checkpoint in place and a Hugging Face directory, three questions at a time, beside the harness's model."""
    names = [name for name in TASKS if chat or name != "own_prefilled"]
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model)},
        tasks=names,
        device="cpu",
        batch_size=1,
        num_fewshot=num_fewshot,
        task_manager=TaskManager(include_path=str(own), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    flags = ["--tasks", ",".join(names), "--batch-size", "3", *(["--chat"] if chat else [])]
    flags += [] if num_fewshot is None else ["--num-fewshot", str(num_fewshot)]
    for source in (model, trained):
        out = tmp_path / source.name
        found = ask(source, own, out, *flags)
        assert found.exit_code == 0, found.output
        scores = json.loads((out / "tiny" / "lm_eval.json").read_text())["scores"]
        for name, rows in rows_of(theirs).items():
            ours = {key: score for key, score in scores[name][name].items() if "_stderr" not in key}
            assert ours == pytest.approx(rows, rel=1e-3), name  # fp32, sums in another order
        for name in ("own_answer", "own_prefilled")[: 2 if chat else 1]:
            lines = (out / "tiny" / f"lm_eval_{name}.jsonl").read_text().splitlines()
            answers = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, lines)}
            assert answers == {one["doc_id"]: one["filtered_resps"] for one in theirs["samples"][name]}
            assert len(set(map(str, answers.values()))) > 2, "all alike would prove little"
        if not chat:
            assert scores["own_greedy"]["own_greedy"]["acc,none"] == pytest.approx(4 / 9)
            assert "own_greedy: 1 requests lost their beginning" in found.stderr
            assert "own_text: " not in found.stderr, "which is read in windows"


def test_finished_tasks_are_kept_until_a_task_file_changes(
    trained: Path,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A group shows its parts too, and models stand side by side; where one is, is no repository of git."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def counting(**how: Any) -> Any:
        asked.append((*how["tasks"], how["limit"]))
        assert how["task_manager"].metadata == {"tokenizer": str(trained / "hf")}
        return simple_evaluate(**how)

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", counting)
    for more in ("own", "own", "own,own_answer"):
        found = ask(trained, own, tmp_path, "--tasks", more, "--samples", "2")
        assert found.exit_code == 0, found.output
    assert asked == [("own", 2), ("own_answer", 2)]
    assert "fatal" not in capfd.readouterr().err
    table = [line.split() for line in found.stdout.splitlines()]
    assert ["task", "metric", "tiny"] in table
    assert {row[0] for row in table if row[1:2] == ["acc"]} == {"own", "own_choice", "own_greedy"}
    assert any(row[:2] == ["own_choice", "acc"] and row[3] == "±" for row in table)
    (own / "own_choice.yaml").touch()
    assert ask(trained, own, tmp_path, "--tasks", "own", "--samples", "2").exit_code == 0
    assert asked[2:] == [("own", 2)]


def test_data_that_lies_elsewhere_makes_other_questions(tmp_path: Path) -> None:
    """As in the documentation: /data/questions.jsonl."""
    (tmp_path / "tasks").mkdir()
    lines = f'doc_to_text: !function own.text\ngen_prefix: "a\\0b"\ndescription: {"long " * 99}\n'
    write_tasks(tmp_path, {"tasks/own": lines}, [{}])
    known = tasks_identity(tmp_path / "tasks")
    (tmp_path / "another.jsonl").write_text("{}\n")
    assert tasks_identity(tmp_path / "tasks") == known
    (tmp_path / "questions.jsonl").write_text("{}\n{}\n")
    assert tasks_identity(tmp_path / "tasks") != known
    (tmp_path / "tasks/broken.yaml").write_text("{")
    assert tasks_identity(tmp_path / "tasks")


def test_other_settings_are_other_questions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **how: how["metadata"])
    nothing = {"results": {}, "configs": {}, "samples": {}}
    monkeypatch.setattr(harness_tasks, "open_backend", lambda *_, **__: nullcontext(Mock()))
    monkeypatch.setattr(harness_tasks, "_ask", lambda *how: asked.append(how) or nothing)
    once = Questions(("own",))
    for questions in (
        once,
        once,
        replace(once, chat=True),
        once,
        replace(once, metadata={"max_seq_lengths": "8k"}),
        once,
        replace(once, num_fewshot=2),
        replace(once, samples=2),
    ):
        run_questions(checkpoint, questions, tmp_path)
    assert [how[1] for how in asked].count(once) == 3, "asked again after --chat took its place"
    assert len(asked) == 7
    assert asked[0][2] == {"tokenizer": str(checkpoint / "hf")}, "in whose tokens lengths are counted"
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {
        "lm_eval_own.jsonl",
        "lm_eval_size2_own.jsonl",
    }
    for what in ("version", "model_identity"):
        monkeypatch.setattr(harness_tasks, what, lambda _: "another")
        run_questions(checkpoint, replace(once, samples=2), tmp_path)
    assert len(asked) == 9
    run_questions(checkpoint, replace(once, samples=2), tmp_path, overwrite=True)
    assert len(asked) == 10
    file = tmp_path / "lm_eval_size2.json"
    content = json.loads(file.read_text())
    for scores in (0.5, {"own": 0.5}, {"own": {"acc,none": "high"}}):  # as a hand may have left it
        file.write_text(json.dumps({**content, "scores": {"own": scores}}))
        with pytest.raises(
            UserError, match=r"lm_eval_size2\.json: not a whole result .*; delete it, and run the task"
        ):
            run_questions(checkpoint, replace(once, samples=2), tmp_path)
    file.write_text(json.dumps({**content, "scores": {"own": {"own": {"acc,none": None}}}}))
    found = run_questions(checkpoint, replace(once, samples=2), tmp_path)
    assert isnan(found["own"]["own"]["acc,none"]), "as JSON has it"


def test_the_model_is_opened_as_told_and_a_rank_that_only_lends_its_part_writes_nothing(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Mock(return_value=nullcontext(None))
    monkeypatch.setattr(harness_tasks, "open_backend", opened)
    how: dict[str, Any] = {"batch_size": 3, "cp": 2, "world": Mock()}
    assert run_questions(hf_directory, Questions(("own",)), tmp_path / "out", **how) == {}
    assert not (tmp_path / "out").exists()
    assert (opened.call_args.args, opened.call_args.kwargs) == ((hf_directory,), how)


def test_tasks_are_made_to_a_length_in_the_models_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless --metadata names another tokenizer."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **how: how)
    questions = Questions(("own",), Path("mine"), {"max_seq_lengths": "8k"})
    assert questions.manager(Path("model")) == {
        "include_path": "mine", "metadata": {"tokenizer": "model", "max_seq_lengths": "8k"},
    }  # fmt: skip
    questions = Questions(("own",), metadata={"tokenizer": "other"})
    assert questions.manager(Path("model")) == {"include_path": None, "metadata": {"tokenizer": "other"}}
    assert questions.manager(None)["metadata"] == {"tokenizer": "other"}
    assert Questions(("own",)).manager(None)["metadata"] == {}


def test_answers_are_kept_with_their_scores_and_without_documents(tmp_path: Path) -> None:
    sample = {"doc_id": 3, "doc": {"long": "text"}, "arguments": "long", "target": Path("as Python has it")}
    sample |= {"filter": "none", "filtered_resps": ["a"], "metrics": ["f1"], "f1": 0.5}
    _write_answers(tmp_path / "answers.jsonl", {"a": [sample, sample], "b": [{}]})
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    kept = {"doc_id": 3, "target": "as Python has it", "filter": "none", "filtered_resps": ["a"], "f1": 0.5}
    assert lines[0] == lines[1] == {"task": "a", **kept}
    assert lines[2]["task"] == "b"


def test_what_cannot_be_asked_is_told_before_a_model_is_opened(
    model: Path, own: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prolong.evaluation.harness_tasks.open_backend", pytest.fail)

    def refusal(*more: str) -> str:
        error = ask(model, own, tmp_path, *more).exception
        assert isinstance(error, UserError)
        return str(error)

    assert "no such task; did you mean own_choice" in refusal("--tasks", "own_choices")
    (tmp_path / "broken/mine").mkdir(parents=True)
    (tmp_path / "broken/mine/own.yaml").write_text("task: mine\ndoc_to_text: {{question}\n")
    broken = refusal("--tasks", "mine", "--include", str(tmp_path / "broken"))
    assert "no such task; " in broken and "mine/own.yaml cannot be read as YAML: while parsing" in broken
    with pytest.raises(UserError, match=r"own: .* no such task; `lm-eval ls tasks` lists them"):
        Questions(("own",)).check([])  # without --include
    assert "name at least one" in refusal("--tasks", ",")
    assert "not JSON" in refusal("--tasks", "own", "--metadata", "{")
    assert "must be a JSON object" in refusal("--tasks", "own", "--metadata", "[]")
    assert "gone: no such directory" in refusal("--tasks", "own", "--include", str(tmp_path / "gone"))
    monkeypatch.setattr(
        "megatron_prolong.evaluation.harness_tasks.load_tokenizer", lambda _: Mock(chat_template=None)
    )
    assert "has no chat template" in refusal("--tasks", "own", "--chat")
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if add_generation_prompt %}{{ raise_exception('no lone message') }}{% endif %}"
    )
    monkeypatch.setattr("megatron_prolong.evaluation.harness_tasks.load_tokenizer", lambda _: refusing)
    assert "refuses it: no lone message; leave --chat out" in refusal("--tasks", "own", "--chat")
    for name in ("bos_token", "eos_token"):  # the other one will do
        setattr(refusing, name, None)
        Questions(("own",), own).check([model])
        setattr(refusing, name, getattr(tokenizer, name))
    refusing.bos_token = refusing.eos_token = None
    assert f"{model}: the tokenizer has neither BOS nor EOS" in refusal("--tasks", "own")
    monkeypatch.setattr("megatron_prolong.evaluation.harness_scores.find_spec", lambda _: None)
    assert "pip install 'megatron-prolong[eval]'" in refusal("--tasks", "own")


def test_answers_drawn_at_random_and_answers_without_room_are_refused(
    trained: Path, own: Path, tmp_path: Path
) -> None:
    answer = (own / "own_answer.yaml").read_text()
    for name, old, new in (
        ("drawn", "max_new_tokens: 6", "max_new_tokens: 6, do_sample: true"),
        ("endless", "max_new_tokens: 6", "max_new_tokens: 1024"),
    ):
        text = answer.replace("task: own_answer", f"task: {name}").replace(old, new)
        (tmp_path / f"{name}.yaml").write_text(text)
    assert "draws its answers" in str(ask(trained, tmp_path, tmp_path, "--tasks", "drawn").exception)
    assert "no room for its prompts" in str(ask(trained, tmp_path, tmp_path, "--tasks", "endless").exception)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{{question}}", "{{quest}}", "UndefinedError: 'quest' is undefined"),
        ("metric: exact_match", "metric: exact_mach", "KeyError"),
        ("num_fewshot: 1", "num_fewshot: 99", "ValueError: Sample larger than population"),
    ],
)
def test_a_mistake_in_a_task_of_ones_own_is_one_message(
    hf_directory: Path, own: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = (
        (own / "own_answer.yaml").read_text().replace("task: own_answer", "task: mistaken").replace(old, new)
    )
    (tmp_path / "mistaken.yaml").write_text(text)
    error = ask(hf_directory, tmp_path, tmp_path / "out", "--tasks", "mistaken").exception
    assert isinstance(error, UserError), error
    assert f"mistaken: lm-evaluation-harness cannot ask this task ({said}" in str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ConnectionError("no Hub"), UserError), (OSError(errno.ENOSPC, "No space left on device"), OSError)],
)
def test_data_that_is_not_there_and_a_full_disk_are_no_mistakes_in_a_task(
    error: OSError,
    kind: type[Exception],
    hf_directory: Path,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", Mock(side_effect=error))
    found = ask(hf_directory, own, tmp_path, "--tasks", "own_answer").exception
    assert type(found) is kind and "mend its YAML" not in str(found)


def test_a_fault_of_the_model_keeps_its_traceback(
    hf_directory: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HuggingFaceBackend, "generate", lambda *_: {}["ours"])
    assert isinstance(ask(hf_directory, own, tmp_path, "--tasks", "own_answer").exception, KeyError)


def test_a_task_of_two_groups_is_shown_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    """They may ask it with other shots."""
    of_two = {"a": {"acc,none": 0.25, "acc_stderr,none": 0.0}, "b": {"acc,none": 1, "acc_stderr,none": 0.125}}
    print_questions(
        {
            "tiny": {"one": {"a": {"acc,none": 0.5}}, "two": of_two},
            "other": {"two": {"b": {"acc,none": 0.75}}},
        }
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row[:1] in (["a"], ["b"])] == [
        ["a", "(of", "one)", "acc", "0.5000"], ["a", "(of", "two)", "acc", "0.2500", "±", "0.0000"],
        ["b", "acc", "1.0000", "±", "0.1250", "0.7500"],
    ]  # fmt: skip


def test_whether_a_choice_is_the_greedy_answer_is_not_reported_as_no() -> None:
    results = {
        "choice": {
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "exact_match,none": 0.0,
            "alias": "choice",
            "sample_len": 9,
        }
    }
    assert rows_of({"results": results, "configs": {"choice": {"output_type": "multiple_choice"}}}) == {
        "choice": {"acc,none": 0.5}
    }
    assert "exact_match,none" in rows_of({"results": results, "configs": {}})["choice"]
