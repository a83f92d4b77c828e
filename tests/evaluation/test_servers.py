"""The openai backend and the judge against a real HTTP server that stumbles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import Server, client

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, encode
from megatron_prolong.evaluation.client import Client
from megatron_prolong.evaluation.judge import (
    Judge,
    judge_prompts,
    judge_results,
    last_object,
    summary_scores,
)
from megatron_prolong.evaluation.openai import UNKNOWN_LENGTH, OpenAIBackend
from megatron_prolong.evaluation.prompts import prepare
from megatron_prolong.evaluation.results import judged_path
from megatron_prolong.evaluation.run import Settings, run_task
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Inputs


def test_prompts_come_back_in_order_after_failures(server: Server, tokenizer: Any) -> None:
    server.stumbles = 5
    backend = OpenAIBackend.connect(client(server, concurrency=4), "tiny", tokenizer)
    prompts = [Prompt(f"number {index}", chat=index % 2 == 1) for index in range(12)]
    outputs = list(backend.generate(prompts, 9, stop=["\n"]))
    assert outputs == [f"{'chat' if index % 2 else 'echo'} number {index}" for index in range(12)]
    assert len(server.requests) == 12 + 5
    assert all(body["max_tokens"] == 9 and body["temperature"] == 0.0 for _, body in server.requests)
    assert all(body["stop"] == ["\n"] for _, body in server.requests), "the server need not write on"
    assert backend.max_length == 512


def test_prompt_and_answer_stay_within_the_servers_length(server: Server, tokenizer: Any) -> None:
    """HELMET's rule for long prompts can leave one a few tokens too long, which a server refuses."""
    backend = OpenAIBackend.connect(client(server), "tiny", tokenizer)
    text = "q" * 505
    list(backend.generate([Prompt(text), Prompt(text, chat=True), Prompt("q")], 16))
    assert [len(encode(tokenizer, Prompt(text, chat))) for chat in (False, True)] == [505, 526]
    assert sorted(body["max_tokens"] for _, body in server.requests) == [1, 7, 16]


def test_what_was_answered_before_an_error_is_kept(server: Server, tokenizer: Any, tmp_path: Path) -> None:
    """Two of the four prompts of a task, which are handed over together."""
    (task,) = select("synthetic", [1024], ["json_kv"])
    inputs = Inputs(None, tokenizer, 42, 4)
    backend = OpenAIBackend(client(server, concurrency=1), "tiny", tokenizer, 1024)
    server.refused_after = 2
    with pytest.raises(UserError, match="maximum context length"):
        run_task(task, backend, inputs, Settings(), tmp_path)
    server.refused_after = None
    server.requests.clear()
    run_task(task, backend, inputs, Settings(), tmp_path)
    assert len(server.requests) == 2


def test_what_was_answered_behind_an_error_is_kept(
    server: Server, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four prompts fails when the others are under way."""
    (task,) = select("synthetic", [1024], ["json_kv"])
    inputs, ask, to_fail = Inputs(None, tokenizer, 42, 4), Client.complete, [True]
    lock = threading.Lock()

    def complete(client: Client, path: str, body: dict[str, Any]) -> str:
        with lock:
            fails = bool(to_fail and to_fail.pop())
        if fails:
            while len(server.requests) < 3:
                time.sleep(0.001)
            raise UserError("refused")
        return ask(client, path, body)

    monkeypatch.setattr(Client, "complete", complete)
    backend = OpenAIBackend(client(server, concurrency=4), "tiny", tokenizer, 1024)
    with pytest.raises(UserError, match="refused"):
        run_task(task, backend, inputs, Settings(), tmp_path / "results")
    run_task(task, backend, inputs, Settings(), tmp_path / "results")
    assert len(server.requests) == 4

    to_fail.append(True)
    server.requests.clear()
    judge = Judge(backend.client, "tiny", tmp_path / "cache.jsonl")
    with pytest.raises(UserError, match="refused"):
        judge.ask(["a", "b", "c", "d"], 4)
    judge.ask(["a", "b", "c", "d"], 4)
    assert len(server.requests) == 4

    with judge.cache.open("a") as file:
        file.write('{"key": "half')  # as a kill leaves it
    for _ in range(2):
        judge.ask(["e"], 4)
    assert len(server.requests) == 5, "an answer joined to half a line is paid for twice"


def test_an_interrupt_waits_for_no_answer() -> None:
    """A server may take half an hour for each: neither the call nor the end of the process may stay for it."""
    program = (
        "import os, signal, threading, time\n"
        "from megatron_prolong.evaluation.client import Client\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "list(Client('', concurrency=2).map(time.sleep, [600, 600, 600]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stderr.endswith("KeyboardInterrupt\n")


def test_a_prepared_prompt_is_encoded_once(
    server: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million tokens take a second to count."""
    (task,) = select("synthetic", [1024], ["json_kv"])
    row = {"context": "JSON data", "question": "key", "demos": "", "k": 1}
    prepared = prepare(task, row, False, tokenizer, 1024)
    assert prepared.ids == encode(tokenizer, Prompt(prepared.prompt.text))
    backend = OpenAIBackend.connect(client(server), "tiny", tokenizer)
    monkeypatch.setattr(type(tokenizer), "__call__", pytest.fail)
    list(backend.generate([prepared.prompt], 16))
    assert len(server.requests) == 1


def test_what_the_server_refuses_is_not_tried_again(server: Server, tokenizer: Any) -> None:
    backend = OpenAIBackend.connect(client(server), "tiny", tokenizer)
    with pytest.raises(UserError, match="maximum context length"):
        list(backend.generate([Prompt("too long")], 4))
    assert len(server.requests) == 1
    with pytest.raises(
        UserError, match=r'401 Unauthorized: .*unauthorized"} \(the key is read from OPENAI_API_KEY'
    ):
        list(backend.generate([Prompt("no key")], 4))


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": [{}]}, {"error": "busy"}, [1]])
def test_an_answer_without_text_is_shown(
    server: Server, tokenizer: Any, tmp_path: Path, answer: object
) -> None:
    server.whole_answer = answer
    refused = client(server, retries=1)
    with pytest.raises(UserError, match=r"/completions: .*" + re.escape(json.dumps(answer))):
        list(OpenAIBackend(refused, "tiny", tokenizer, 512).generate([Prompt("a")], 4))
    with pytest.raises(UserError, match=r"/chat/completions: .*" + re.escape(json.dumps(answer))):
        Judge(refused, "tiny", tmp_path / "cache.jsonl").ask(["a"], 4)
    with pytest.raises(UserError, match="/models: "):
        OpenAIBackend.connect(refused, "tiny", tokenizer)
    server.whole_answer = {"data": [{"id": "tiny", "max_model_len": "many"}]}
    with pytest.raises(UserError, match="/models: "):
        OpenAIBackend.connect(refused, "tiny", tokenizer)


@pytest.mark.parametrize("status", [200, 404])
def test_a_page_of_a_web_site_is_called_one(server: Server, tokenizer: Any, status: int) -> None:
    server.page = (status, "\n<!DOCTYPE html>\n<html>" + "<p>no such page</p>" * 9)
    asked = client(server, retries=0)
    with pytest.raises(UserError, match=r"/models: .*an HTML page$"):
        OpenAIBackend.connect(asked, "tiny", tokenizer)
    with pytest.raises(UserError, match=r"/completions: .*an HTML page") as error:
        list(OpenAIBackend(asked, "tiny", tokenizer, 512).generate([Prompt("a")], 4))
    assert "<" not in str(error.value)
    elsewhere = replace(asked, base_url=asked.base_url.removesuffix("/v1"))
    with pytest.raises(UserError) as error:
        OpenAIBackend.connect(elsewhere, "tiny", tokenizer)
    assert ("addresses end in /v1" in str(error.value)) == (status == 404)


def test_half_an_emoji_is_a_question_mark(server: Server, tokenizer: Any) -> None:
    server.whole_answer = {"choices": [{"text": "\ud83d x"}]}
    assert list(OpenAIBackend(client(server), "tiny", tokenizer, 512).generate([Prompt("a")], 4)) == ["? x"]


def test_an_address_without_its_scheme_is_not_tried() -> None:
    with pytest.raises(UserError, match=r"localhost:8000/v1: .* http://"):
        Client("localhost:8000/v1").get("models")


def test_a_server_that_stays_away_is_named(tokenizer: Any) -> None:
    nobody = Client("http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/models: .*refused"):
        OpenAIBackend.connect(nobody, "tiny", tokenizer)


def test_an_unknown_model_lists_the_known(server: Server, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="it serves tiny"):
        OpenAIBackend.connect(client(server), "huge", tokenizer)
    server.whole_answer = {"data": [{"id": "huge"}]}
    assert OpenAIBackend.connect(client(server), "huge", tokenizer).max_length == UNKNOWN_LENGTH


def helmet_checkout(directory: Path) -> Path:
    """Scripts with prompts of the right names, as far as the judge looks."""
    scripts = directory / "scripts"
    scripts.mkdir()
    (scripts / "eval_gpt4_longqa.py").write_text(
        'judge_prompt = """Q {question} C {correct_answers} A {parsed_output} {{"fluency": 1}}"""\nexit(1)\n'
    )
    return directory


def test_the_judge_scores_caches_and_resumes(server: Server, tmp_path: Path) -> None:
    helmet = helmet_checkout(tmp_path)
    items = [{"question": f"q{n}", "answer": ["x"], "output": f"Answer:\nout {n}"} for n in range(3)]
    result = tmp_path / "narrativeqa_7892_v1__in8192_size3_shots2.json"
    result.write_text(json.dumps({"data": items, "averaged_metrics": {"f1": 1.0}, "args": {}}))
    server.answer = 'First {"fluency": 0, "correctness": 0}. So {"fluency": 1, "correctness": 2}'
    judge = Judge(client(server), "tiny", tmp_path / "cache.jsonl")
    (written,) = judge_results(tmp_path, judge, helmet)
    content = json.loads(written.read_text())
    assert content["averaged_metrics"]["gpt-4-score"] == 2.0
    assert content["data"][0]["gpt-4-scores"] == {"fluency": 1, "correctness": 2}
    prompts = {body["messages"][0]["content"] for _, body in server.requests}
    assert "Q q0 C ['x'] A out 0 {\"fluency\": 1}" in prompts
    written.unlink()
    with (tmp_path / "cache.jsonl").open("a") as file:
        file.write('{"answer": "of nobody"}\n{"key": "cut o')
    judge_results(tmp_path, judge, helmet)
    with pytest.raises(UserError, match="give the folder of one model's results"):
        judge_results(tmp_path / "nowhere", judge, helmet)
    with pytest.raises(UserError, match="no results of a model here; give "):
        judge_results(tmp_path.parent, judge, helmet)
    assert len(server.requests) == 3, "the second run must find every answer in the cache"
    assert not judge_results(tmp_path, judge, helmet)
    assert judge_results(tmp_path, Judge(client(server), "other", judge.cache), helmet) == [written]
    assert len(server.requests) == 6, "another judge is asked anew"
    judged_path(result).write_text("{}")
    assert not judge_results(tmp_path, judge, helmet), "HELMET's own files, which name no judge, stay"


@pytest.mark.parametrize(
    "answer",
    [
        '{"fluency": "1", "correctness": "3"}',
        '{"fluency": null, "correctness": 3}',
        '{"fluency": NaN, "correctness": 3}',
        "[1]",
        "",
    ],
)
def test_a_judges_score_that_is_no_number_cannot_be_read(server: Server, tmp_path: Path, answer: str) -> None:
    items = [{"question": "q", "answer": ["x"], "output": "out"}]
    result = tmp_path / "narrativeqa_7892_v1__in8192_size1_shots2.json"
    result.write_text(json.dumps({"data": items, "averaged_metrics": {}, "args": {}}))
    server.answer = answer
    with pytest.raises(UserError, match=r"none of the judge's answers can be read.*cache\.jsonl: delete it"):
        judge_results(
            tmp_path, Judge(client(server), "tiny", tmp_path / "cache.jsonl"), helmet_checkout(tmp_path)
        )


def test_an_answer_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"question": f"q{n}", "answer": ["x"], "output": "out"} for n in range(3)]
    result = tmp_path / "narrativeqa_7892_v1__in8192_size3_shots2.json"
    result.write_text(json.dumps({"data": items, "averaged_metrics": {}, "args": {}}))
    answers = iter(['{"fluency": 1, "correctness": 3}', '{"fluency": 1}', '{"fluency": 1, "correctness": 0}'])
    monkeypatch.setattr(Judge, "_one", lambda *_: next(answers))
    judge = Judge(Client("", concurrency=1), "tiny", tmp_path / "cache.jsonl")
    (written,) = judge_results(tmp_path, judge, helmet_checkout(tmp_path))
    content = json.loads(written.read_text())
    assert content["averaged_metrics"]["gpt-4-score"] == 1.5 and content["judge"]["unreadable"] == 1
    assert [item["gpt-4-scores"] is None for item in content["data"]] == [False, True, False]


@pytest.mark.parametrize(("name", "suffix"), [("infbench_sum_eng", "_book"), ("multi_lexsum", "")])
def test_three_answers_of_the_judge_make_a_summarys_score(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [f"{kind}_prompt{suffix}" for kind in ("fluency", "recall", "precision")]
    script = "".join(f'{kind} = "{kind} {{summary}} {{keypoints}} {{expert_summary}}"\n' for kind in kinds)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/eval_gpt4_summ.py").write_text(script)
    items = [
        {
            "output": f" {output} ",
            "keypoints": points,
            "answer": [f"book {output}"],
            "summary/long": f"law {output}",
        }
        for output, points in (("one", ["a", "b"]), ("two", ["c"]))
    ]
    (tmp_path / f"{name}_in8192_shots2.json").write_text(json.dumps({"data": items, "averaged_metrics": {}}))
    asked = []

    def answer(judge: Judge, prompt: str, max_tokens: int) -> str:
        asked.append(prompt)
        found = {"fluency": int(" one " in prompt), "recall": 1, "precision": 1, "sentence_count": 2}
        return json.dumps(found)

    monkeypatch.setattr(Judge, "_one", answer)
    judge = Judge(Client("", concurrency=1), "tiny", tmp_path / "cache.jsonl")
    (written,) = judge_results(tmp_path, judge, tmp_path)
    expert = "book" if suffix else "law"
    assert asked == [
        f"{kind} {output} {points} {expert} {output}"
        for output, points in (("one", "1. a\n2. b"), ("two", "1. c"))
        for kind in kinds
    ]
    content = json.loads(written.read_text())
    means = {"recall": 0.75, "precision": 0.5, "fluency": 0.5, "f1": 0.25}
    assert content["averaged_metrics"] == {f"gpt-4-{score}": mean for score, mean in means.items()}
    assert [item["gpt-4-scores"]["f1"] for item in content["data"]] == [0.5, 0]
    assert content["judge"] == {"model": "tiny", "unreadable": 0}


def test_summary_scores() -> None:
    answers = ['{"fluency": 1}', '{"recall": 2}', 'text {"precision": 3, "sentence_count": 4}']
    scores = summary_scores(answers, 4)
    assert scores is not None and (scores["recall"], scores["precision"]) == (0.5, 0.75)
    assert scores["f1"] == pytest.approx(0.6)
    mute = summary_scores([answers[0], '{"recall": 0}', '{"precision": 0, "sentence_count": 0}'], 0)
    assert mute is not None and (mute["recall"], mute["precision"], mute["f1"]) == (0, 0, 0)
    nothing, text = "nothing", '{"fluency": "1"}'
    assert summary_scores([nothing, *answers[1:]], 4) is None
    assert summary_scores([text, '{"recall": 0}', answers[2]], 4) is None, "the mean of texts cannot be taken"


def test_the_last_object_counts() -> None:
    assert last_object('a {"x": 1} b {"x": 2}') == {"x": 2}
    assert last_object('So:\n```json\n{"x": {"y": 1}}\n```') == {"x": {"y": 1}}
    assert last_object('{"x": [{"y": 1}]') is None and last_object('{"x": 1') is None


def test_a_damaged_result_is_named(server: Server, tmp_path: Path) -> None:
    judge, helmet = Judge(client(server), "tiny", tmp_path / "cache.jsonl"), helmet_checkout(tmp_path)
    result = tmp_path / "narrativeqa_7892_v1__in8192_size1_shots2.json"
    for damaged in ("{", '{"data": [{"output": "out"}]}'):
        result.write_text(damaged)
        with pytest.raises(UserError, match=result.name):
            judge_results(tmp_path, judge, helmet)
    result.write_text("{}")
    for damaged in ("{", '{"judge": "tiny"}'):
        judged_path(result).write_text(damaged)
        with pytest.raises(
            UserError, match=rf"{judged_path(result).name}: .*delete it, and judge its answers"
        ):
            judge_results(tmp_path, judge, helmet)


def test_a_script_of_helmets_that_is_damaged_is_named(tmp_path: Path) -> None:
    script = tmp_path / "eval_gpt4_longqa.py"
    script.write_text("judge_prompt = (")
    with pytest.raises(UserError, match=r"eval_gpt4_longqa\.py: no Python .*never closed"):
        judge_prompts(script, ["judge_prompt"])
