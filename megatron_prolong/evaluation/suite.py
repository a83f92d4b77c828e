"""Run a suite on one model, every task in turn, each resumable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Backend, Prompt, encode
from megatron_prolong.evaluation.data_check import how_to_get
from megatron_prolong.evaluation.results import Result, read_arguments
from megatron_prolong.evaluation.run import Settings, length_limit, run_task, uses_chat
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Entails, Inputs, Task
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.recipe.schema import EvaluationSpec


def refuse_another_model(out: Path, model: str, identity: str, files: str = "*_shots*.json") -> None:
    """A folder holds the results of one model, which may be trained further or moved, but not both at once.

    Args:
        files: which of the results there; those of the short suite may be of a checkpoint's export.

    Raises:
        UserError: a result there is of a model in another place with other weights.
    """
    for path in sorted(out.glob(files)):
        known = read_arguments(path)
        if not isinstance(known, dict) or known.get("model_name_or_path", model) == model:
            continue
        if not identity or known.get("model_identity") != identity:
            raise UserError(
                f"{out} holds results of another model, {known['model_name_or_path']}; name this one "
                f"(LABEL={model}) or give another --out; --overwrite replaces what is there"
            )


def runnable(tasks: Sequence[Task], data: Path | None, skip_missing: bool) -> list[Task]:
    """The tasks whose data is there or can be generated.

    Raises:
        UserError: a length has no room for a prompt; `data` is given and not there; or some tasks cannot run, with
            all the reasons and remedies, unless `skip_missing`, which prints them.
    """
    if cramped := [task for task in tasks if task.length <= task.max_new_tokens]:
        task = cramped[0]
        raise UserError(
            f"{task.name} at a length of {task.length} tokens: its answer may take {task.max_new_tokens} of them; "
            f"ask for a longer one ({task.length}K is {task.length << 10:,}), or leave the task out (--tasks)"
        )
    able = [task for task in tasks if task.generated or not task.missing(data)]
    unable = [task for task in tasks if task not in able]
    names = ", ".join(dict.fromkeys(f"{task.name} ({format_count(task.length)})" for task in unable))
    if unable and not (skip_missing and able):
        raise _no_data(unable, names, data)
    if data is not None and not data.is_dir():
        raise UserError(f"{data}: no such directory; name the data's, or none to have the tasks generated")
    if unable:
        print(f"skipped for want of data: {names}", file=sys.stderr)
    return able


def tasks_of(spec: EvaluationSpec) -> list[Task]:
    """What a recipe's `evaluation:` asks for.

    Raises:
        UserError: there is no such task, or its data is missing.
    """
    return runnable(select(spec.suite, spec.lengths, spec.tasks), spec.data, skip_missing=False)


def _no_data(tasks: Sequence[Task], names: str, data: Path | None) -> UserError:
    folder = data or Path("data")
    files: dict[str, list[str]] = {}  # by the remedy, which many share
    for path in dict.fromkeys(path for task in tasks for path in task.missing(data)):
        files.setdefault(how_to_get(path, folder), []).append(str(folder / path))
    problems = [f"{', '.join(found)}\n{indent(remedy, ' ' * 6)}" for remedy, found in files.items()]
    return UserError.many(
        f"no data for {names}; fetch it and name its directory (--data, in a recipe "
        "evaluation.data), or leave these out (--skip-missing, evaluation.tasks):",
        problems,
    )


def refuse_cramped(tasks: Sequence[Task], inputs: Inputs) -> None:
    """Have every generated task make no rows at the shortest length, which fails where not one would fit.

    Raises:
        UserError: a task has no room there.
    """
    shortest = min((task.length for task in tasks), default=0)
    for task in tasks:
        if task.length == shortest and task.generated:
            task.rows(replace(inputs, max_samples=0))


def refuse_chat(tasks: Sequence[Task], tokenizer: Any, chat: str) -> None:
    """Raises UserError when a task wants a chat template and there is none, or one that refuses a question."""
    if any(uses_chat(task, tokenizer, chat) for task in tasks):
        encode(tokenizer, Prompt("x", chat=True))


def refuse_lengths_beyond(tasks: Sequence[Task], model: str, declared: int, too_long: str) -> None:
    """Raises UserError when one of the tasks is longer than the model declares (see `length_limit`)."""
    for task in tasks:
        length_limit(task, model, declared, too_long)


def run_suite(
    tasks: Sequence[Task],
    backend: Backend,
    inputs: Inputs,
    settings: Settings,
    out: Path,
    entails: Entails | None = None,
) -> list[Result]:
    """All results, in the order of the tasks; finished ones are read, not run again.

    Raises:
        UserError: see `run_task`; a length beyond the model's before the first task is run.
    """
    refuse_lengths_beyond(tasks, backend.model, backend.max_length, settings.too_long)
    return [run_task(task, backend, inputs, settings, out, entails) for task in tasks]
