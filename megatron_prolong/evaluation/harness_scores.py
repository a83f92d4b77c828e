"""Scores that lm-evaluation-harness gives, task by task, in a file that a stopped run goes on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.results import read_whole, whole_result
from megatron_prolong.evaluation.run import is_of
from megatron_prolong.runtime.publish import is_disk_full
from megatron_prolong.runtime.replace import replaced
from megatron_prolong.runtime.strict_json import write_json

T = TypeVar("T")


def check_harness() -> None:
    """Raises UserError when it is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("this needs lm-evaluation-harness: pip install 'megatron-prolong[eval]'")


def simple_evaluate(**options: Any) -> Any:
    """The harness's, without what it finds out of the machine for its own records.

    It asks git, which complains on the terminal where there is no repository, and pip, which takes seconds.

    Raises:
        UserError: a task's data is not there and cannot be fetched.
    """
    from lm_eval import evaluator

    without = [
        (evaluator, "get_git_commit_hash", lambda: None),
        (evaluator, "add_env_info", lambda results: None),
    ]
    try:
        with replaced(without):
            return evaluator.simple_evaluate(**options)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"{', '.join(options['tasks'])}: {error}; files of your own must be there; what lies on the Hugging "
            "Face Hub is fetched by lm-evaluation-harness: run it once where the Hub can be reached, with the same "
            "HF_HOME (finished tasks are kept)"
        ) from error


def remembered(
    path: Path,
    arguments: dict[str, Any],
    names: Sequence[str],
    ask: Callable[[str], T],
    read: Callable[[Any], T],
    overwrite: bool,
) -> dict[str, T]:
    """The scores of tasks by name: those in the file, if it is of the same arguments, and the rest asked and added.

    Args:
        read: makes of what the file holds of a task what `ask` gave.
        overwrite: ask again what is there.
    """
    with whole_result(path):
        written = read_whole(path)["scores"] if path.exists() and is_of(path, arguments) else {}
        scores = {name: read(found) for name, found in written.items()}
    for name in names:
        if name not in scores or overwrite:
            scores[name] = ask(name)
            write_json(path, {"args": arguments, "scores": scores})
    return scores


def read_score(written: Any) -> float:
    """A number of such a file, in which null is NaN. Raises TypeError or ValueError for anything else."""
    return math.nan if written is None else float(written)
