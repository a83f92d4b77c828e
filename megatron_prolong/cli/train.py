"""`prolong train` and `prolong status`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.cli.recipe import Overrides, RecipePath, warn
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.recipe.schema import Recipe
    from megatron_prolong.runtime.launch import World
    from megatron_prolong.runtime.rendezvous import Rendezvous
    from megatron_prolong.runtime.signals import StopRequest
    from megatron_prolong.training.run import Evaluate


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check recipe, data and checkpoints for this many ranks; do not train."),
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Start this many processes instead of one; under srun, on every node.")
    ] = 1,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="[STAGE:]STEP",
            help="Make this step again, from the newest checkpoint before it, and print its batch; writes nothing.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="With --replay: directory for a profile of the step, one file per rank."),
    ] = None,
) -> None:
    """Train every stage of a recipe that is not done yet.

    Run it again after any interruption to continue. Works as it is for one process; under torchrun or srun it takes
    its place from them. Exits with 75 when asked to stop (SIGTERM, SIGUSR1) after saving, so that a batch script
    can requeue.
    """
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.recipe.validate import check as check_recipe
    from megatron_prolong.runtime.rendezvous import read_number, read_rendezvous

    if trace is not None and replay is None:
        raise UserError(f"--trace {trace}: needs --replay [STAGE:]STEP, the step to profile")
    load = cache(partial(load_recipe, recipe, overrides or []))
    if check:
        asked = read_number(os.environ, "WORLD_SIZE", 0) if processes == 1 else 0
        world_size = asked or processes * read_rendezvous(os.environ).size
        for change in check_start(load(), world_size):
            print(change)
        print(f"{recipe}: ready for {world_size} rank(s), {len(load().stages)} stage(s)")
        return
    machine = read_rendezvous(os.environ)
    if processes > 1:
        check_recipe(load(), processes * machine.size)
        _start(processes, machine)
        return
    if machine.size == 1:
        load()  # at once, before torch is imported; several ranks read it together, to complain once
    if replay is None:
        _train(load)
    else:
        _replay(load, replay, trace)


def check_start(recipe: Recipe, world_size: int) -> list[str]:
    """Everything that a start refuses, but for the checkpoints' contents, in seconds.

    Returns:
        What has changed since the last start.
    """
    from megatron_prolong.plan.disk import check_room
    from megatron_prolong.recipe.validate import check
    from megatron_prolong.training.changes import changes_since_start

    warn(check(recipe, world_size))
    warn(_check_data(recipe))
    check_room(recipe)
    if recipe.evaluation:
        from megatron_prolong.evaluation.backend import load_tokenizer
        from megatron_prolong.evaluation.in_training import read_held_out
        from megatron_prolong.evaluation.suite import refuse_cramped, tasks_of
        from megatron_prolong.evaluation.suites import left_out
        from megatron_prolong.evaluation.task import Inputs

        spec, directory = recipe.evaluation, _tokenizer_directory(recipe)
        refuse_cramped(tasks_of(spec), Inputs(spec.data, load_tokenizer(directory)))
        read_held_out(spec, directory)
        warn(left_out(spec.suite, spec.lengths, spec.tasks))
    return [f"changed since the last start: {change}" for change in changes_since_start(recipe)]


def _check_data(recipe: Recipe) -> list[str]:
    """But for a finished stage's, which may have been deleted to make room. Returns warnings."""
    from megatron_prolong.data.mixture import check_shards
    from megatron_prolong.recipe.validate import is_done

    return check_shards(stage for stage in recipe.stages if not is_done(recipe, stage))


def _start(processes: int, machine: Rendezvous) -> None:
    """Run this command line in that many processes here; exit like the first of them that failed."""
    from megatron_prolong.runtime.processes import start_processes

    command = sys.argv[1:]
    position = next(index for index, argument in enumerate(command) if argument.startswith("--processes"))
    del command[position : position + (1 if "=" in command[position] else 2)]
    start_processes(command, processes, machine)


def _train(load: Callable[[], Recipe]) -> None:
    from megatron_prolong.runtime.agreement import together
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.runtime.signals import REQUEUE_EXIT_CODE, stop_requests
    from megatron_prolong.training.run import train as train_recipe
    from megatron_prolong.training.stage import Preempted

    with stop_requests() as stop, distributed() as world:
        recipe = together(load)
        evaluate = together(lambda: _ready(recipe, world, stop))
        try:
            final = train_recipe(recipe, world, stop, evaluate)
        except Preempted as event:
            if world.is_main:
                print(f"{event}; continue with the same command")
            sys.exit(REQUEUE_EXIT_CODE)
        except KeyboardInterrupt:
            if world.is_main:
                print(f"stopped; the same command continues from {_newest(recipe)}")
            raise
        if world.is_main:
            print(f"done: {final}")


def _newest(recipe: Recipe) -> str:
    """What is safe on disk, in words."""
    from megatron_prolong.training.run_directory import chain_status

    statuses = chain_status(recipe, recipe.run_dir)
    status = next((status for status in statuses if status.word != "done"), statuses[-1])
    if status.checkpoint is None:
        return f"the beginning of stage {status.stage.name}"
    return f"step {status.step} of stage {status.stage.name} ({status.checkpoint.directory})"


def _replay(load: Callable[[], Recipe], step: str, trace: Path | None) -> None:
    from megatron_prolong.recipe.validate import check
    from megatron_prolong.runtime.agreement import together
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.training.replay import parse_step, replay

    with distributed() as world:
        recipe = together(load)
        stage, number = together(lambda: parse_step(step, recipe))
        together(lambda: check(recipe, world.size, on_cpu=world.device.type == "cpu"))
        for replayed in replay(recipe, stage, number, world, trace):
            if world.is_main:
                print(f"{stage.name} {replayed.step}/{stage.num_steps}")
                if replayed.step == number:
                    print(*replayed.lines(), sep="\n")


def _ready(recipe: Recipe, world: World, stop: StopRequest) -> Evaluate | None:
    """Check everything before any training; the recipe's `evaluation:`, for it to call."""
    from megatron_prolong.evaluation.in_training import CheckpointEvaluation, read_held_out
    from megatron_prolong.evaluation.suite import tasks_of
    from megatron_prolong.evaluation.suites import left_out
    from megatron_prolong.plan.disk import check_room
    from megatron_prolong.recipe.run_files import EVALUATION
    from megatron_prolong.recipe.validate import check
    from megatron_prolong.training.prepare import refuse_precision

    warnings = check(recipe, world.size, on_cpu=world.device.type == "cpu")
    if world.is_main:
        warn(warnings)
        warn(_check_data(recipe))
    if world.device.type == "cuda":
        refuse_precision(recipe)
    check_room(recipe)
    spec = recipe.evaluation
    if spec is None:
        return None
    tasks = tasks_of(spec)
    if world.is_main:
        warn(left_out(spec.suite, spec.lengths, spec.tasks))
    held_out = read_held_out(spec, _tokenizer_directory(recipe)) if world.is_main else []
    out = recipe.run_dir / EVALUATION
    return CheckpointEvaluation(spec, tasks, held_out, out, world, stop.asked)


def _tokenizer_directory(recipe: Recipe) -> Path:
    from megatron_prolong.recipe.inputs import tokenizer_file
    from megatron_prolong.recipe.validate import tokenizer_of

    tokenizer = tokenizer_of(recipe)
    assert tokenizer is not None, "loading refuses a model without path and tokenizer"
    return tokenizer_file(tokenizer).parent


def status(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory (or a recipe, whose run_dir is looked at).")
    ],
    overrides: Overrides = None,
) -> None:
    """Show where the chain of stages of a run stands."""
    from rich.table import Table

    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.report.history import recipe_of_run
    from megatron_prolong.runtime.terminal import print_table
    from megatron_prolong.training.run_directory import chain_status

    if run.is_dir():  # it may have moved since its recipe was written
        recipe, run_dir = recipe_of_run(run, overrides or []), run
    else:
        recipe = load_recipe(run, overrides or [])
        run_dir = recipe.run_dir
    table = Table(title=str(run_dir))
    for heading in ("stage", "status", "step", "length", "RoPE base", "checkpoint"):
        table.add_column(heading)
    for line in chain_status(recipe, run_dir):
        stage = line.stage
        table.add_row(
            stage.name,
            line.word,
            f"{line.step}/{stage.num_steps}",
            f"{stage.sequence_length:,}",
            f"{stage.rope_base:g}" if stage.rope_base else "as before",
            str(line.checkpoint.directory) if line.checkpoint else "–",
        )
    print_table(table)
