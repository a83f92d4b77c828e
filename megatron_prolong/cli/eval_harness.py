"""`prolong eval lm-eval`: tasks of lm-evaluation-harness, and one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prolong.cli.eval import (
    Compare,
    Model,
    check_models,
    folders,
    going_on,
    is_main,
    models_of,
    names_of,
    on_all_ranks,
    ranks,
)
from megatron_prolong.errors import UserError


def lm_eval(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags: longbench2,my_task.")],
    out: Annotated[Path, typer.Option(help="Directory for results, one folder per model.")],
    compare: Compare = None,
    include: Annotated[Path | None, typer.Option(help="Directory of your own tasks (YAML).")] = None,
    metadata: Annotated[
        str, typer.Option(metavar="JSON", help='What tasks read, e.g. {"max_seq_lengths": "128k"}.')
    ] = "{}",
    chat: Annotated[bool, typer.Option("--chat", help="Prompts go through the chat template.")] = False,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before each question (default: the task's number)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Questions per task (default: all).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts asked together.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Ranks that share each very long prompt.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Ask finished tasks again.")] = False,
) -> None:
    """Tasks of lm-evaluation-harness, or your own in its format. A stopped run goes on with the same command."""
    from megatron_prolong.evaluation.harness_tasks import Questions, print_questions, run_questions
    from megatron_prolong.evaluation.results import HARNESS_SCORES
    from megatron_prolong.recipe.shape import model_directory

    def prepare() -> tuple[Questions, list[tuple[str, Path]]]:
        questions = Questions(
            tuple(dict.fromkeys(names_of(tasks))), include, _object(metadata), chat, samples, num_fewshot
        )
        pairs = models_of(model, compare)
        check_models([path for _, path in pairs], cp=cp)
        models = [(label, model_directory(path)) for label, path in pairs]
        if is_main(world):
            questions.check([directory for _, directory in models])
            model_folders(models, out, HARNESS_SCORES, make, overwrite=overwrite)
        return questions, models

    results: dict[str, Any] = {}
    with folders() as make, ranks() as world, going_on(world):
        questions, models = on_all_ranks(world, prepare)
        for label, directory in models:
            results[label] = run_questions(
                directory,
                questions,
                out / label,
                batch_size=batch_size,
                cp=cp,
                overwrite=overwrite,
                world=world,
            )
    if is_main(world):
        print_questions(results)


def model_folders(
    models: Sequence[tuple[str, Path]],
    out: Path,
    scores: str,
    make: Callable[[Path], None],
    *,
    overwrite: bool,
) -> None:
    """Make every model's folder in OUT. Raises UserError where one keeps such scores of another model."""
    from megatron_prolong.evaluation.identity import model_identity
    from megatron_prolong.evaluation.suite import refuse_another_model

    for label, directory in models if not overwrite else ():
        refuse_another_model(out / label, str(directory), model_identity(directory), scores)
    for label, _ in models:
        make(out / label)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"--metadata {text}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f'--metadata {text}: must be a JSON object, e.g. {{"max_seq_lengths": "128k"}}')
    return found
