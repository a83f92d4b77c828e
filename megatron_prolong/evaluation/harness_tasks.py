"""Any task of lm-evaluation-harness (extra `eval`), or in its format: LongBench, BABILong, one's own.

The harness's defaults are kept: metrics, answer lengths and, unless told, shots are the task's, BOS is there where
the tokenizer adds it, and a prompt that is too long loses its beginning.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from megatron_prolong.data.chat import ChatError, apply_template
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import declares, load_tokenizer, open_backend, tokenizer_directory
from megatron_prolong.evaluation.harness_scores import (
    check_harness,
    read_score,
    remembered,
    simple_evaluate,
)
from megatron_prolong.evaluation.identity import model_identity, tasks_identity
from megatron_prolong.runtime.publish import write_durably
from megatron_prolong.runtime.terminal import print_table

if TYPE_CHECKING:
    from megatron_prolong.evaluation.backend import ScoringBackend
    from megatron_prolong.runtime.launch import World

REPETITIONS = 100
"""For the standard error of what is no mean; the harness's 100,000 can take longer than the answers."""
Rows = dict[str, dict[str, float]]
"""By task, or by the parts of a group, then by "metric,filter"; as the harness gives them, most of them 0 to 1."""


@dataclass(frozen=True)
class Questions:
    """What every model is asked.

    Attributes:
        tasks: names of tasks, groups or tags.
        include: a directory with tasks of one's own (YAML files, as the harness reads them).
        metadata: what some tasks read, such as max_seq_lengths.
        chat: prompts go through the chat template.
        samples: so many of every task; None asks all.
        num_fewshot: so many solved examples before each question; None leaves it to the task. A task that says 0
            keeps it, in the harness too.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    samples: int | None = None
    num_fewshot: int | None = None

    def check(self, models: Sequence[Path]) -> None:
        """Before the first is asked.

        Raises:
            UserError: the harness is not installed; a directory or task that is not there; no chat template; a
                tokenizer with neither BOS nor EOS.
        """
        check_harness()
        if self.include and not self.include.is_dir():
            raise UserError(f"--include {self.include}: no such directory")
        known = self.manager(None).all_tasks
        if not self.tasks:
            raise UserError("--tasks: name at least one")
        for name in self.tasks:
            if name not in known:
                raise UserError(
                    f"--tasks {name}: lm-evaluation-harness has no such task; {self._hint(name, known)}"
                )
        for model in models:
            _check_tokenizer(model, self.chat)

    def _hint(self, name: str, known: Sequence[str]) -> str:
        """What may be meant by a name that is not known; files of one's own that are no YAML the harness skips."""
        for file in sorted(self.include.rglob("*.yaml")) if self.include else ():
            try:
                yaml.compose(file.read_bytes())
            except yaml.YAMLError as error:
                return f"{file} cannot be read as YAML: {error}"
        near = get_close_matches(name, known)
        return f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"

    def manager(self, tokenizer: Path | None) -> Any:
        """The harness's index of tasks. Those that are made to a length count in tokens of this tokenizer."""
        from lm_eval.tasks import TaskManager

        own = {"tokenizer": str(tokenizer)} if tokenizer else {}
        include = str(self.include) if self.include else None
        return TaskManager(include_path=include, metadata={**own, **self.metadata})


def _check_tokenizer(model: Path, chat: bool) -> None:
    tokenizer = load_tokenizer(tokenizer_directory(model))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{model}: the tokenizer has neither BOS nor EOS, one of which stands before a text without a prompt; "
            f"name its bos_token in {tokenizer_directory(model) / 'tokenizer_config.json'}"
        )
    if not chat:
        return
    if not tokenizer.chat_template:
        raise UserError(f"--chat: {model} has no chat template; leave --chat out, as for a base model")
    try:
        apply_template(tokenizer, [{"role": "user", "content": "x"}], open_turn=True)
    except ChatError as error:
        raise UserError(f"--chat: {model}: {error}; leave --chat out, or mend the template") from error


def run_questions(
    model: Path,
    questions: Questions,
    out: Path,
    *,
    batch_size: int = 1,
    cp: int = 1,
    overwrite: bool = False,
    world: World | None = None,
) -> dict[str, Rows]:
    """Scores by the names asked for. Finished ones are kept in OUT, and not asked again with these settings.

    Args:
        model: a Hugging Face directory, or a checkpoint directory, which is asked in place by all ranks (the main
            one gets the scores, the others none).
        batch_size, cp, world: as of `open_backend`.
        overwrite: ask finished tasks again.

    Raises:
        UserError: a task's data is not there and cannot be fetched; a task that draws its answers at random.
    """
    with open_backend(model, batch_size=batch_size, cp=cp, world=world) as backend:
        if backend is None:  # a rank that only lent its part of the model
            return {}
        size = "" if questions.samples is None else f"_size{questions.samples}"
        arguments = {
            "model_name_or_path": str(model),
            "model_identity": model_identity(model),
            "max_test_samples": questions.samples,
            "use_chat_template": questions.chat,
            "num_fewshot": questions.num_fewshot,
            "include_identity": tasks_identity(questions.include) if questions.include else "",
            "metadata": dict(questions.metadata),
            "lm_eval": version("lm_eval"),
        }
        manager = questions.manager(tokenizer_directory(model))

        def ask(name: str) -> Rows:
            found = _ask(backend, questions, manager, name)
            _write_answers(out / f"lm_eval{size}_{name}.jsonl", found["samples"])
            return rows_of(found)

        path = out / f"lm_eval{size}.json"
        return remembered(path, arguments, questions.tasks, ask, _read_rows, overwrite)


def _ask(backend: ScoringBackend, questions: Questions, manager: Any, name: str) -> dict[str, Any]:
    """What the harness finds; says how many requests lost their beginning."""
    from megatron_prolong.evaluation.harness import HarnessModel

    asked = HarnessModel(backend, add_bos=None, ask_greedy=True)
    with _the_tasks_own(name):
        found: dict[str, Any] = simple_evaluate(
            model=asked,
            tasks=[name],
            num_fewshot=questions.num_fewshot,
            limit=questions.samples,
            task_manager=manager,
            apply_chat_template=questions.chat,
            bootstrap_iters=REPETITIONS,
        )
    if asked.cut_requests:
        print(
            f"warning: {name}: {asked.cut_requests:,} requests lost their beginning; "
            + declares(backend.model, backend.max_length),
            file=sys.stderr,
        )
    return found


@contextmanager
def _the_tasks_own(name: str) -> Iterator[None]:
    """Around the harness: what fails in it, and not in the model it asks, is a mistake in the task.

    Raises:
        UserError: that; of data that is not there `simple_evaluate` tells.
    """
    from megatron_prolong.evaluation import harness

    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if any(frame.filename == harness.__file__ for frame in extract_tb(error.__traceback__)):
            raise
        raise UserError(
            f"{name}: lm-evaluation-harness cannot ask this task ({type(error).__name__}: {error}); mend its YAML, "
            "its Python or its data (--debug shows where)"
        ) from error


def rows_of(found: Mapping[str, Any]) -> Rows:
    """The scores in what the harness found, without its remarks.

    Without exact_match of choices, too: whether one is the greedy answer was not asked (`HarnessModel`).
    """
    rows: Rows = {}
    for name, scores in found["results"].items():
        choices = found["configs"].get(name, {}).get("output_type") == "multiple_choice"
        rows[name] = {
            metric: float(score)
            for metric, score in scores.items()
            if "," in metric and isinstance(score, int | float)
            if not (choices and metric.startswith("exact_match"))
        }
    return rows


def _read_rows(written: Any) -> Rows:
    """Rows that were written to a file. Raises what `whole_result` names where they are none."""
    return {
        part: {metric: read_score(score) for metric, score in scores.items()}
        for part, scores in written.items()
    }


def _write_answers(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line for every question: the answer and its scores, without document and prompt, which may be long."""
    lines = []
    for task, answered in samples.items():
        for sample in answered:
            kept = ("doc_id", "target", "filter", "filtered_resps", *sample.get("metrics", ()))
            line = {"task": task, **{name: sample.get(name) for name in kept}}
            lines.append(json.dumps(line, default=str) + "\n")  # tasks of Python may answer with anything
    write_durably(path, "".join(lines))


def print_questions(results: Mapping[str, Mapping[str, Rows]]) -> None:
    """Models side by side, by task and metric, with the standard error where there is one."""
    table = Table("task", "metric", *results)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for label, by_name in results.items():
        times = Counter(task for rows in by_name.values() for task in rows)
        for asked, part, scores in ((name, *item) for name, rows in by_name.items() for item in rows.items()):
            task = part if times[part] == 1 else f"{part} (of {asked})"  # each group may give it other shots
            for metric, score in scores.items():
                name, _, how = metric.partition(",")
                if not name.endswith("_stderr"):
                    error = scores.get(f"{name}_stderr,{how}")
                    shown = f"{score:.4f}" + (f" ± {error:.4f}" if error is not None else "")
                    cells.setdefault((task, metric.removesuffix(",none")), {})[label] = shown
    for (task, metric), row in cells.items():
        table.add_row(task, metric, *(row.get(label, "") for label in results))
    print_table(table)
