"""Every prompt, answer and score of the suite is that of HELMET's own code on the same files.

Needs a checkout of HELMET, named by the environment variable HELMET, and what it imports (datasets, pytrec_eval);
without one, digests stand for what it once gave.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from helmet_checkout import HELMET, needs_helmet
from samples import write_data
from stand_ins import short_documents

from megatron_prolong.evaluation.prompts import prepare, render
from megatron_prolong.evaluation.rows import read_split
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Inputs, Row

DIGESTS = json.loads((Path(__file__).parent / "data" / "helmet_digests.json").read_text())
TASKS = {f"{task.category}-{task.name}": task for task in select("helmet", [8192]) + select("ruler", [8192])}
PER_TASK = ("datasets", "input_max_length", "test_files", "demo_files", "generation_max_length")
UNSEEDED = ("narrativeqa", "multi_lexsum")  # whose demonstrations HELMET draws without a seed
HUB = {
    "CogComp/trec": ("trec", {"coarse_label": 6, "fine_label": 50}),
    "PolyAI/banking77": ("banking77", {"label": 77}),
    "clinc_oos": ("clinc_oos", {"intent": 151}),
    "xingkunliuxtracta/nlu_evaluation_data": ("nlu_evaluation_data", {"label": 68}),
    "narrativeqa": ("narrativeqa", {}),
    "allenai/multi_lexsum": ("multi_lexsum", {}),
    "xinrongzhang2022/infinitebench": ("infinitebench", {}),
}
OUTPUTS = (
    "",
    "A",
    "{answer}",
    "Answer: {answer}\nmore",
    "label: 2",
    "[ID: 3] > 14 > 1",
    "no. {last} it is",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def helmet(data: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """HELMET's data.py and model_utils.py; the Hub's data sets are in `data`, and documents need not be long."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pytrec_eval")
    short_documents(monkeypatch)
    load = datasets.load_dataset

    def load_dataset(source: str, *arguments: Any, **options: Any) -> Any:
        if source == "json":
            return load(source, *arguments, **options)
        folder, labels = HUB[source]
        splits = datasets.DatasetDict()
        for file in (data / "hf" / folder).glob("*.jsonl"):
            splits[file.stem] = datasets.Dataset.from_list(read_split(file.parent, file.stem))
        for field, size in labels.items():
            splits = splits.cast_column(field, datasets.ClassLabel(num_classes=size))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.syspath_prepend(str(HELMET))
    code = re.sub(r"num_proc=\d+", "num_proc=None", (HELMET / "data.py").read_text(encoding="utf-8"))
    module = ModuleType("helmet_data")
    exec(code.replace("131072", "4000").replace("65536", "4000"), module.__dict__)
    module.__dict__["AutoTokenizer"] = SimpleNamespace(from_pretrained=lambda name: byte_tokenizer)
    from model_utils import tokenize

    yield SimpleNamespace(load_data=module.__dict__["load_data"], tokenize=tokenize)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def outputs_for(row: Row) -> list[str]:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    return [output.format(answer=answers[0], last=answers[-1]) for output in OUTPUTS]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores_are_what_helmet_gave(
    name: str, data: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails and the comparison with HELMET itself does not, the digest is to be replaced."""
    short_documents(monkeypatch)
    task = TASKS[name]
    found: list[Any] = [task.metrics]
    for row in task.load(task, Inputs(data, byte_tokenizer, max_samples=5)):
        scored = [task.score(output, row) for output in outputs_for(row)]
        scores = [{key: round(float(value), 4) for key, value in one.scores.items()} for one in scored]
        prompts = [render(task, row, chat).text for chat in (False, True)]
        found.append([row[task.question], prompts, row["answer"], scores, [one.parsed for one in scored]])
    assert digest(found) == DIGESTS["tasks"][name]


@needs_helmet
@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores_are_helmets(name: str, helmet: Any, data: Path, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer
    task = TASKS[name]
    if task.name.startswith(UNSEEDED):
        task = replace(task, shots=0)
    random.seed(42)
    files = [str(data / file) if file else "" for file in (task.test_file, task.demo_file)]
    arguments = SimpleNamespace(max_test_samples=5, shots=task.shots, seed=42)
    theirs = helmet.load_data(arguments, task.name, *files)
    rows = task.load(task, Inputs(data, tokenizer, max_samples=5))
    assert len(rows) == len(theirs["data"]) > 1
    for row, their_row in zip(rows, theirs["data"], strict=True):
        assert row["answer"] == their_row["answer"]
        for chat in (False, True):
            whole = prepare(task, row, chat, tokenizer, 1 << 20)
            for max_length in (1 << 20, len(whole.ids) + task.max_new_tokens - 9):
                ids = helmet.tokenize(
                    dict(their_row),
                    theirs,
                    tokenizer,
                    max_length,
                    task.max_new_tokens,
                    chat,
                    system_message=None,
                ).input_ids[0]
                assert prepare(task, row, chat, tokenizer, max_length).ids == ids.tolist()
        for output in outputs_for(row):
            scores, other = theirs["post_process"]({"output": output}, their_row)
            scored = task.score(output, row)
            assert scored.scores == pytest.approx(scores, abs=1.1e-5), output
            assert scored.parsed == other["parsed_output"]


LENGTHS = (8192, 16384, 32768, 65536, 131072)


def settings() -> dict[tuple[str, str, int], tuple[Any, ...]]:
    """Of every task at every length of HELMET's."""
    return {
        (task.category, task.name, task.length): (
            task.test_file, task.demo_file, task.max_new_tokens, task.chat, task.max_samples, task.shots,
        )
        for task in [*select("helmet", LENGTHS), *select("ruler", LENGTHS)]
    }  # fmt: skip


def test_settings_are_what_helmets_configurations_were() -> None:
    assert digest(sorted([*key, *value] for key, value in settings().items())) == DIGESTS["settings"]


@needs_helmet
def test_files_lengths_and_settings_are_those_of_helmets_configurations() -> None:
    """At every length: data and demonstration files, answer tokens, chat template, questions and shots."""
    theirs = {}
    for category in ("recall", "rag", "rerank", "icl", "longqa", "summ", "cite", "ruler"):
        for file in (f"{category}.yaml", f"{category}_short.yaml"):
            config = yaml.safe_load((HELMET / "configs" / file).read_text(encoding="utf-8"))
            lists = {name: str(config[name]).split(",") for name in PER_TASK}
            for name, length, *rest in zip(*(lists[field] for field in PER_TASK), strict=True):
                files = [path.removeprefix("data/") for path in rest[:2]]
                common = (config["use_chat_template"], config["max_test_samples"], config["shots"])
                theirs[category, name, int(length)] = (*files, int(rest[2]), *common)
    assert len(theirs) == 170
    assert settings() == theirs
