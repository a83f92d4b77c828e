"""What extension cost on short tasks: ProLong's five, through lm-evaluation-harness (extra `eval`).

Shot counts are those of the old Open LLM Leaderboard, which the paper's numbers for Llama-3-8B-Instruct agree
with; the paper itself does not state them. Neither does it say whether texts begin with BOS: the leaderboard's and
every harness of that time left it out, and later ones (0.4.9.2) add it where the tokenizer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import backend_kind, open_backend
from megatron_prolong.evaluation.harness_scores import read_score, remembered, simple_evaluate
from megatron_prolong.evaluation.identity import model_identity
from megatron_prolong.evaluation.published import published
from megatron_prolong.runtime.terminal import print_table

if TYPE_CHECKING:
    from megatron_prolong.runtime.launch import World

ADD_BOS = False


@dataclass(frozen=True)
class ShortTask:
    """A task of lm-evaluation-harness with its shots and the metric that is reported."""

    name: str
    shots: int
    metric: str


TASKS = (
    ShortTask("hellaswag", 10, "acc_norm,none"),
    ShortTask("mmlu", 5, "acc,none"),
    ShortTask("arc_challenge", 25, "acc_norm,none"),
    ShortTask("winogrande", 5, "acc,none"),
    ShortTask("gsm8k", 5, "exact_match,strict-match"),
)


def select_short(names: Sequence[str]) -> tuple[ShortTask, ...]:
    """All tasks, or those of these names. Raises UserError for a name that none has."""
    known = {task.name: task for task in TASKS}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"suite short has no task {', '.join(unknown)}; it has {', '.join(known)}")
    return tuple(known[name] for name in names) or TASKS


def run_short(
    model: Path,
    out: Path,
    samples: int | None = None,
    tasks: tuple[ShortTask, ...] = TASKS,
    overwrite: bool = False,
    batch_size: int = 1,
    world: World | None = None,
) -> dict[str, float]:
    """Scores, 0 to 100, by task; finished ones are kept in OUT, and not run again with these settings.

    Args:
        model: a Hugging Face directory, which is asked by the harness's own model of transformers, or a checkpoint
            directory, which is asked in place by all ranks (the main one gets the scores, the others none).
        samples: questions per task; None asks all.
        overwrite: run finished tasks again.
        batch_size: questions asked together, of a checkpoint by each replica.
        world: as of `open_backend`.

    Raises:
        UserError: a task's data is not there and cannot be fetched.
    """
    from lm_eval.tasks import TaskManager

    by_name = {task.name: task for task in tasks}
    with _open(model, batch_size, world) as asked:
        if asked is None:
            return {}
        manager = TaskManager()
        path = out / ("short.json" if samples is None else f"short_size{samples}.json")
        arguments = {
            "model_name_or_path": str(model),
            "model_identity": model_identity(model),
            "max_test_samples": samples,
            "add_bos_token": ADD_BOS,
            "lm_eval": version("lm_eval"),
            "tasks": [asdict(task) for task in TASKS],
        }

        def ask(name: str) -> float:
            task = by_name[name]
            found = simple_evaluate(
                tasks=[name],
                num_fewshot=task.shots,
                limit=samples,
                task_manager=manager,
                bootstrap_iters=0,
                **asked,
            )
            return 100 * float(found["results"][name][task.metric])

        return remembered(path, arguments, list(by_name), ask, read_score, overwrite)


@contextmanager
def _open(model: Path, batch_size: int, world: World | None) -> Iterator[dict[str, Any] | None]:
    """What the harness is told of the model; None on ranks that only lent their part, once it is done."""
    if backend_kind(model) == "hf":
        yield {
            "model": "hf",
            "model_args": {"pretrained": str(model), "add_bos_token": ADD_BOS},
            "batch_size": batch_size,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        return
    with open_backend(model, batch_size=batch_size, world=world) as backend:
        if backend is None:
            yield None
        else:
            from megatron_prolong.evaluation.harness import HarnessModel

            yield {"model": HarnessModel(backend, add_bos=ADD_BOS, ask_greedy=False)}


def print_short(results: Mapping[str, Mapping[str, float]]) -> None:
    """Models side by side with the published scores."""
    columns = {**results, **{f"{name} (published)": scores for name, scores in published("short", 0).items()}}
    table = Table("task", *columns, title="Short tasks (0–100)")
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    for name in names:
        table.add_row(name, *(f"{scores[name]:.1f}" if name in scores else "" for scores in columns.values()))
    print_table(table)
