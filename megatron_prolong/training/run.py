"""The chain of stages: find where the run stands, and train on from there to the end, with pauses to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_prolong.convert.initial import write_initial
from megatron_prolong.convert.sidecar import copy_sidecar
from megatron_prolong.convert.staging import staged_directory
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import tokenizer_file
from megatron_prolong.recipe.load import dump_recipe
from megatron_prolong.recipe.run_files import INITIAL, RESOLVED_RECIPE, SIDECAR
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.recipe.shape import HF_DIR, MANIFEST, model_directory
from megatron_prolong.recipe.validate import needs_model
from megatron_prolong.runtime.agreement import against_main, from_main, on_main, together
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.lock import DirectoryLock
from megatron_prolong.runtime.publish import write_durably
from megatron_prolong.runtime.signals import StopRequest
from megatron_prolong.training.changes import changes_since_start, refuse_other_work, work_of
from megatron_prolong.training.log import RunLog, open_log
from megatron_prolong.training.prepare import StageInput
from megatron_prolong.training.run_directory import Checkpoint, StageStatus, latest_checkpoint
from megatron_prolong.training.stage import Preempted, Session, train_stage

CONVERSION_TIMEOUT = timedelta(days=1)  # hundreds of GB, from a slow disk to a slow disk

Evaluate = Callable[[Path], Mapping[str, float]]
"""Measures a checkpoint. Collective, called outside any Megatron setup; returns scores to log on the main rank, and
none when it has measured this checkpoint before."""


def train(recipe: Recipe, world: World, stop: StopRequest, evaluate: Evaluate | None = None) -> Path:
    """Train every stage that is not done yet. Collective; returns the last stage's final checkpoint.

    Starting again after any interruption is the same call: finished stages are skipped, a begun one continues
    from its newest checkpoint.

    Args:
        evaluate: called with the checkpoints that the recipe's `evaluation:` wants measured.

    Raises:
        UserError: the recipe changed in a way that cannot be taken up half-way, is not the same on all ranks, or
            its inputs are unusable.
        training.stage.Preempted: asked to stop.
    """
    against_main(work_of(recipe), refuse_other_work)
    with ExitStack() as stack:
        log = on_main(lambda: _open(recipe, stack))
        initial = previous = _initial_checkpoint(recipe)
        on_main(lambda: _write_sidecar(recipe, initial))
        session = Session(recipe, world, log, stop, recipe.run_dir / SIDECAR)
        for stage in recipe.stages:
            for checkpoint in _pieces(session, stage, previous, initial):
                if evaluate and _wants_evaluation(recipe, stage, checkpoint.step):
                    _evaluate(session, evaluate, stage, checkpoint)
            previous = checkpoint
    return previous.directory


def _pieces(
    session: Session, stage: Stage, previous: Checkpoint, initial: Checkpoint
) -> Iterator[Checkpoint]:
    """Train a stage to its end in pieces that end where it is evaluated; yields its checkpoint between them."""
    recipe = session.recipe
    while True:
        status = StageStatus(stage, _newest_checkpoint(recipe.run_dir / stage.name))
        if status.checkpoint is not None:
            yield status.checkpoint
        if status.word == "done":
            return
        if session.stop.agreed():
            raise Preempted(f"stopped at step {status.step} of stage {stage.name}")
        until = next(
            step
            for step in range(status.step + 1, stage.num_steps + 1)
            if _wants_evaluation(recipe, stage, step)
        )
        start = stage_input(status, previous, initial)
        _announce(session.log, status, start)
        train_stage(session, stage, start, until)


def _newest_checkpoint(stage_dir: Path) -> Checkpoint | None:
    """As rank 0 sees it: what another node sees of a network file system may be seconds old. Collective."""
    return from_main(on_main(lambda: latest_checkpoint(stage_dir)))


def _wants_evaluation(recipe: Recipe, stage: Stage, step: int) -> bool:
    every = recipe.evaluation.every if recipe.evaluation else None
    return step == stage.num_steps or (every is not None and step % every == 0)


def _evaluate(session: Session, evaluate: Evaluate, stage: Stage, checkpoint: Checkpoint) -> None:
    if session.stop.agreed():
        raise Preempted(f"stopped before evaluating step {checkpoint.step} of stage {stage.name}")
    scores = evaluate(checkpoint.directory)
    if session.log and scores:
        session.log.evaluation(stage.name, checkpoint.step, scores)
    if session.stop.agreed():
        raise Preempted(f"stopped while evaluating step {checkpoint.step} of stage {stage.name}")


def stage_input(status: StageStatus, previous: Checkpoint, initial: Checkpoint) -> StageInput:
    """The carry-over rule of one stage."""
    if status.checkpoint is not None:
        return StageInput(status.checkpoint, optimizer=True, resume=True)
    carry = status.stage.carry
    source = previous if carry.weights else initial
    has_optimizer = source.manifest["kind"] == "training"
    return StageInput(source, optimizer=carry.optimizer and has_optimizer, resume=False)


def _announce(log: RunLog | None, status: StageStatus, start: StageInput) -> None:
    if log:
        what = "weights and optimizer" if start.optimizer else "weights"
        verb = "continues from" if start.resume else f"starts with {what} of"
        log.say(f"stage {status.stage.name} {verb} {start.checkpoint.directory}")


def _open(recipe: Recipe, stack: ExitStack) -> RunLog:
    """Lock the run directory and write the resolved recipe into it, unless that contradicts the run so far."""
    run_dir = recipe.run_dir
    stack.enter_context(DirectoryLock(run_dir))
    log = stack.enter_context(open_log(recipe))
    for change in changes_since_start(recipe):
        log.say(f"changed since the last start: {change}")
    write_durably(run_dir / RESOLVED_RECIPE, dump_recipe(recipe))
    return log


def initial_directory(recipe: Recipe) -> Path:
    """Where the weights before the first stage are, or will be once converted or made."""
    path = recipe.model.path and model_directory(recipe.model.path)
    return path if path is not None and (path / MANIFEST).exists() else recipe.run_dir / INITIAL


def _initial_checkpoint(recipe: Recipe) -> Checkpoint:
    """The weights before the first stage, as a checkpoint any layout can load. Collective.

    Once no stage is to start from them, the first stage's own checkpoint stands for them: they may be gone.
    """
    if not from_main(on_main(lambda: needs_model(recipe))):
        first = _newest_checkpoint(recipe.run_dir / recipe.stages[0].name)
        assert first is not None, "needs_model() saw one"
        return first
    converted = initial_directory(recipe)
    patient = dist.new_group(backend="gloo", timeout=CONVERSION_TIMEOUT)
    on_main(lambda: _write_initial(recipe, converted), patient)
    dist.destroy_process_group(patient)
    return together(lambda: _open_initial(converted))


def _write_initial(recipe: Recipe, converted: Path) -> None:
    if (converted / MANIFEST).exists():
        return
    if recipe.model.path is not None:
        to_megatron(recipe.model.path, converted)
    else:
        assert recipe.model.init is not None and recipe.model.tokenizer is not None
        write_initial(recipe.model.init, recipe.model.tokenizer, converted, seed=recipe.stages[0].seed)


def _write_sidecar(recipe: Recipe, initial: Checkpoint) -> None:
    """Once: the model's directory may go when its weights have been read."""
    sidecar, tokenizer = recipe.run_dir / SIDECAR, recipe.model.tokenizer
    if not sidecar.exists():
        with staged_directory(sidecar, 0) as partial:
            copy_sidecar(initial.directory / HF_DIR, partial, tokenizer and tokenizer_file(tokenizer).parent)


def _open_initial(converted: Path) -> Checkpoint:
    if not (converted / MANIFEST).exists():
        raise UserError(
            f"{converted} was not written by rank 0: is the run directory on a shared file system?"
        )
    return Checkpoint.open(converted)
