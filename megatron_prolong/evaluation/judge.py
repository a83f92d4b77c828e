"""Scores by a judging model: HELMET's procedure for NarrativeQA and for the two summary tasks.

The judge's instructions are HELMET's own, read from a checkout of its repository (parsed, never executed), so
that they are the same to the letter. Answers are cached on disk: a stopped run goes on, a repeated one costs
nothing. Writes NAME-gpt4eval_o.json beside every result NAME.json, as HELMET's scripts do.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.client import Client
from megatron_prolong.evaluation.partial import open_to_add, sample_key
from megatron_prolong.evaluation.results import judged_path, read_whole, result_paths, whole_result
from megatron_prolong.evaluation.text_metrics import parse_output
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.strict_json import read_lines, write_json

QUESTIONS = "narrativeqa_"
SUMMARIES = ("infbench_sum_", "multi_lexsum_")
QA_TOKENS, SUMMARY_TOKENS = 2048, 4096


@dataclass(frozen=True)
class Judge:
    """A served model with the sampling of HELMET's scripts, and a cache file of its answers."""

    client: Client
    model: str
    cache: Path

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """The answers, in order; only what the cache does not hold is asked."""
        known = self._cached()
        keys = [sample_key(self.model, max_tokens, prompt) for prompt in prompts]
        open_prompts = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        with open_to_add(self.cache) as file:
            answers = self.client.map(lambda prompt: self._one(prompt, max_tokens), open_prompts.values())
            for key, answer in zip(open_prompts, track(answers, len(open_prompts), "judge"), strict=True):
                if answer is None:  # an error will follow
                    continue
                known[key] = answer
                file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
        return [known[key] for key in keys]

    def _one(self, prompt: str, max_tokens: int) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.1,
            "top_p": 0.9,
            "seed": 42,
            "max_tokens": max_tokens,
        }
        return self.client.complete("chat/completions", body)

    def _cached(self) -> dict[str, str]:
        entries = read_lines(self.cache)
        return {entry["key"]: entry["answer"] for entry in entries if entry.keys() == {"key", "answer"}}


def judge_results(directory: Path, judge: Judge, helmet: Path) -> list[Path]:
    """Judge every result under `directory` that wants it and has none by this judge; returns the files written."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the folder of one model's results")
    written = []
    for path in result_paths(directory):
        target = judged_path(path)
        if _judged_by(target, judge.model):
            continue
        with whole_result(path):
            if path.name.startswith(QUESTIONS):
                content = _judge_questions(path, judge, helmet)
            elif path.name.startswith(SUMMARIES):
                content = _judge_summaries(path, judge, helmet)
            else:
                continue
        write_json(target, content)
        written.append(target)
    return written


def _judged_by(target: Path, model: str) -> bool:
    """HELMET's own files, which do not name their judge, are left as they are."""
    if not target.exists():
        return False
    with whole_result(target):
        return bool(read_whole(target).get("judge", {}).get("model", model) == model)


def _judge_questions(path: Path, judge: Judge, helmet: Path) -> dict[str, Any]:
    """fluency (0, 1) × correctness (0 to 3), mean over the answers that can be read."""
    content = read_whole(path)
    template = judge_prompts(helmet / "scripts" / "eval_gpt4_longqa.py", ["judge_prompt"])["judge_prompt"]
    prompts = [
        template.format(
            question=item["question"],
            correct_answers=item["answer"],
            parsed_output=parse_output(item["output"].replace("\n", " ")),
        )
        for item in content["data"]
    ]
    answers = judge.ask(prompts, QA_TOKENS)
    totals = []
    for item, answer in zip(content["data"], answers, strict=True):
        found = last_object(answer)
        pair = _numbers(found, "fluency", "correctness")
        item["gpt-4-scores"] = found if pair else None
        if pair:
            totals.append(math.prod(pair))
    if not totals:
        raise _unable(path, judge)
    content["averaged_metrics"]["gpt-4-score"] = float(np.mean(totals))
    content["judge"] = {"model": judge.model, "unreadable": len(answers) - len(totals)}
    return content


def _judge_summaries(path: Path, judge: Judge, helmet: Path) -> dict[str, Any]:
    """Three questions per summary: fluency, key points found, sentences supported by the expert's summary."""
    content = read_whole(path)
    suffix = "_book" if path.name.startswith("infbench") else ""
    names = [f"{kind}_prompt{suffix}" for kind in ("fluency", "recall", "precision")]
    templates = judge_prompts(helmet / "scripts" / "eval_gpt4_summ.py", names)
    prompts = []
    for item in content["data"]:
        if "keypoints" not in item:
            raise UserError(
                f"{path}: no key points in it; put HELMET's infbench/ and multi_lexsum/ files into the data "
                "directory and run the task again with --overwrite"
            )
        points = "\n".join(f"{number}. {point}" for number, point in enumerate(item["keypoints"], start=1))
        expert = item["answer"][0] if suffix else item["summary/long"]
        summary = item["output"].strip()
        fields = {"text": summary, "summary": summary, "keypoints": points, "expert_summary": expert}
        prompts += [templates[name].format(**fields) for name in names]
    answers = judge.ask(prompts, SUMMARY_TOKENS)
    judged = []
    for number, item in enumerate(content["data"]):
        scores = summary_scores(answers[3 * number : 3 * number + 3], len(item["keypoints"]))
        if scores is not None:
            item["gpt-4-scores"] = scores
            judged.append(scores)
    if not judged:
        raise _unable(path, judge)
    for name in ("recall", "precision", "fluency", "f1"):
        content["averaged_metrics"][f"gpt-4-{name}"] = float(np.mean([scores[name] for scores in judged]))
    content["judge"] = {"model": judge.model, "unreadable": len(content["data"]) - len(judged)}
    return content


def _unable(path: Path, judge: Judge) -> UserError:
    return UserError(
        f"{path}: none of the judge's answers can be read; is {judge.model} able? They are kept in {judge.cache}: "
        "delete it to have them asked again"
    )


def summary_scores(answers: Iterable[str], num_points: int) -> dict[str, Any] | None:
    """Recall, precision and F1 (times fluency) from the three answers; None when one cannot be read."""
    fluency_text, recall_text, precision_text = answers
    fluency = _numbers(last_object(fluency_text), "fluency")
    recall = _numbers(last_object(recall_text), "recall")
    precision = _numbers(last_object(precision_text), "precision", "sentence_count")
    if fluency is None or recall is None or precision is None:
        return None
    supported_sentences, sentences = precision
    found = recall[0] / num_points if num_points else 0.0
    supported = supported_sentences / sentences if sentences else 0.0
    f1 = fluency[0] * 2 * found * supported / (found + supported) if found + supported else 0.0
    return {
        "fluency": fluency[0],
        "recall_total": num_points,
        "recall_found": recall[0],
        "precision_total": sentences,
        "precision_found": supported_sentences,
        "recall": found,
        "precision": supported,
        "f1": f1,
        "fluency_output": fluency_text,
        "recall_output": recall_text,
        "precision_output": precision_text,
    }


def _numbers(found: dict[str, Any] | None, *names: str) -> list[Any] | None:
    """Numbers out of an answer's object; None without one, or when one is missing or is none ("1", null, NaN)."""
    values = [(found or {}).get(name) for name in names]
    readable = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    return values if readable else None


def last_object(text: str) -> dict[str, Any] | None:
    """The last {…} of an answer, or the fenced json block; None when neither is JSON."""
    candidates = re.findall(r"\{.*?\}", text, re.DOTALL)[-1:] + re.findall(r"```json(.+)```", text, re.DOTALL)
    for candidate in candidates:
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        return found if isinstance(found, dict) else None
    return None


def judge_prompts(script: Path, names: Sequence[str]) -> dict[str, str]:
    """String constants of a Python file, found by parsing.

    Raises:
        UserError: no such file, or it lacks one of them.
    """
    if not script.exists():
        raise UserError(
            f"{script}: no such file; --helmet wants a checkout of https://github.com/princeton-nlp/HELMET"
        )
    try:
        parsed = ast.parse(script.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{script}: no Python ({error}); take HELMET's checkout anew") from error
    found: dict[str, str] = {}
    for node in parsed.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    found[target.id] = node.value.value
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{script}: does not define {', '.join(missing)}; use HELMET at its April 2025 version"
        )
    return found
