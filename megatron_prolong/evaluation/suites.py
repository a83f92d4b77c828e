"""Named sets of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.task import Task
from megatron_prolong.evaluation.tasks import ruler
from megatron_prolong.evaluation.tasks.cite import cite_tasks
from megatron_prolong.evaluation.tasks.icl import icl_tasks
from megatron_prolong.evaluation.tasks.longqa import longqa_tasks
from megatron_prolong.evaluation.tasks.rag import rag_tasks
from megatron_prolong.evaluation.tasks.recall import json_kv_task
from megatron_prolong.evaluation.tasks.rerank import rerank_tasks
from megatron_prolong.evaluation.tasks.summ import summ_tasks
from megatron_prolong.recipe.numbers import format_count

CATEGORIES = ("recall", "rag", "rerank", "icl", "longqa", "summ", "cite")
SYNTHETIC_RULER = ("niah_s_1", "niah_mk_2", "niah_mk_3", "vt", "cwe", "fwe")
NO_SUITE = "none"  # of a recipe that has held-out documents only
WITH_ALL_DATA = 32 << 10
PROLONG_LEFT_OUT = ("kilt_triviaqa", "infbench", "ruler", "alce")


def helmet(length: int) -> list[Task]:
    """All seven categories."""
    recall = [ruler.ruler_task(name, length, category="recall") for name in ruler.RECALL]
    return [
        *recall,
        json_kv_task(length),
        *rag_tasks(length),
        *rerank_tasks(length),
        *icl_tasks(length),
        *longqa_tasks(length),
        *summ_tasks(length),
        *cite_tasks(length),
    ]


def prolong(length: int) -> list[Task]:
    """The subset that ProLong was developed on (paper, §2.2 and appendix A.4)."""
    return [task for task in helmet(length) if is_of_prolong(task.name)]


def is_of_prolong(name: str) -> bool:
    """Whether a task of HELMET's is in that subset."""
    return not name.startswith(PROLONG_LEFT_OUT)


def synthetic(length: int) -> list[Task]:
    """What needs no data at all: JSON KV and the RULER tasks without prose."""
    return [json_kv_task(length), *(ruler.ruler_task(name, length) for name in SYNTHETIC_RULER)]


SUITES = {"helmet": helmet, "ruler": ruler.ruler_tasks, "prolong": prolong, "synthetic": synthetic}


def select(suite: str, lengths: Sequence[int], names: Sequence[str] = ()) -> list[Task]:
    """The tasks of a suite at some lengths; `names` keeps those whose name or category contains one of them.

    Raises:
        UserError: a name that no task has.
    """
    if suite == NO_SUITE:
        return []
    tasks = [task for length in lengths for task in SUITES[suite](length)]
    named = {name: [task for task in tasks if name == task.category or name in task.name] for name in names}
    if unknown := [name for name in names if not named[name]]:
        known = sorted({task.name for task in tasks})
        raise UserError(
            f"suite {suite} has no task {', '.join(unknown)} at {', '.join(map(format_count, lengths))}; "
            f"it has {', '.join(known) or 'none'}"
        )
    return [task for task in tasks if not names or any(task in found for found in named.values())]


def left_out(suite: str, lengths: Sequence[int], names: Sequence[str] = ()) -> list[str]:
    """In words: the categories that `select` leaves out at some lengths, since HELMET has no data for these."""
    everything = {task.category for task in select(suite, [*lengths, WITH_ALL_DATA], names)}
    found = []
    for length in lengths:
        here = {task.category for task in select(suite, [length])}
        if lacking := [category for category in CATEGORIES if category in everything - here]:
            found.append(
                f"suite {suite} has no {', '.join(lacking)} at {format_count(length)}, where HELMET has no data "
                "for it; the mean there is of the rest (8K is 8,192)"
            )
    return found
