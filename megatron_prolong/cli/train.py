"""`prolong train` and `prolong status`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.cli.recipe import Overrides, RecipePath
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.recipe.schema import Recipe
    from megatron_prolong.runtime.launch import World
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
        int, typer.Option(min=1, help="Start this many local processes (through torchrun) instead of one.")
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

    if trace is not None and replay is None:
        raise UserError(f"--trace {trace}: needs --replay [STAGE:]STEP, the step to profile")
    resolved = load_recipe(recipe, overrides or [])
    launched = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    world_size = processes if processes > 1 else launched
    if check:
        check_recipe(resolved, world_size)
        if resolved.evaluation:
            from megatron_prolong.evaluation.in_training import tasks_of

            tasks_of(resolved.evaluation)
        print(f"{recipe}: ready for {world_size} rank(s), {len(resolved.stages)} stage(s)")
        return
    if processes > 1:
        check_recipe(resolved, processes)  # here: torchrun would bury the message under a report of its own
        _relaunch(processes)
    import torch

    check_recipe(resolved, world_size, on_cpu=not torch.cuda.is_available())
    if replay is None:
        _train(resolved)
    else:
        _replay(resolved, replay, trace)


def _relaunch(processes: int) -> None:
    """Replace this process by torchrun with the same command line."""
    command = [argument for argument in sys.argv[1:] if argument != "--debug"]
    position = next(index for index, argument in enumerate(command) if argument.startswith("--processes"))
    del command[position : position + (1 if "=" in command[position] else 2)]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    os.execv(sys.executable, [*launcher, "-m", "megatron_prolong", *command])


def _train(recipe: Recipe) -> None:
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.runtime.lost_rank import RankLost
    from megatron_prolong.runtime.signals import REQUEUE_EXIT_CODE, stop_requests
    from megatron_prolong.training.run import train as train_recipe
    from megatron_prolong.training.stage import Preempted

    with stop_requests() as stop, distributed() as world:
        evaluate = _evaluation(recipe, world, stop)
        try:
            final = train_recipe(recipe, world, lambda: stop.agreed(world.device), evaluate)
        except Preempted as event:
            if world.is_main:
                print(f"{event}; continue with the same command")
            sys.exit(REQUEUE_EXIT_CODE)
        except RankLost as event:
            print(f"error: {event}", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly exit would wait for the rank that is gone
        if world.is_main:
            print(f"done: {final}")


def _replay(recipe: Recipe, step: str, trace: Path | None) -> None:
    from megatron_prolong.runtime.launch import distributed
    from megatron_prolong.training.replay import parse_step, replay

    stage, number = parse_step(step, recipe)
    with distributed() as world:
        for replayed in replay(recipe, stage, number, world, trace):
            if world.is_main:
                print(f"{stage.name} {replayed.step}/{stage.num_steps}")
                if replayed.step == number:
                    print(*replayed.lines(), sep="\n")


def _evaluation(recipe: Recipe, world: World, stop: StopRequest) -> Evaluate | None:
    """The recipe's `evaluation:` for training to call, checked before any training."""
    from megatron_prolong.evaluation.in_training import CheckpointEvaluation, tasks_of

    spec = recipe.evaluation
    if spec is None:
        return None
    out = recipe.run_dir / "evaluation"
    return CheckpointEvaluation(spec, tasks_of(spec), out, world, lambda: stop.received is not None)


def status(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory (or a recipe, whose run_dir is looked at).")
    ],
    overrides: Overrides = None,
) -> None:
    """Show where the chain of stages of a run stands."""
    from rich.table import Table

    from megatron_prolong.cli.tables import print_table
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.training.run_directory import RESOLVED_RECIPE
    from megatron_prolong.training.state import chain_status

    recipe = load_recipe(run / RESOLVED_RECIPE if run.is_dir() else run, overrides or [])
    table = Table(title=str(recipe.run_dir))
    for heading in ("stage", "status", "step", "length", "RoPE base", "checkpoint"):
        table.add_column(heading)
    for line in chain_status(recipe, recipe.run_dir):
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
