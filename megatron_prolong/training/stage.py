"""One stage: build the model at the stage's layout, load what it carries over, and walk its steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prolong.convert.manifest import manifest
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.errors import JointError, UserError
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.plan.flops import model_flops
from megatron_prolong.recipe.load import dump_recipe
from megatron_prolong.recipe.schema import Recipe, Stage, settings_of
from megatron_prolong.runtime.agreement import together
from megatron_prolong.runtime.determinism import deterministic_kernels
from megatron_prolong.runtime.full_gpu import naming_a_full_gpu
from megatron_prolong.runtime.garbage import collected_by_hand
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.lost_rank import naming_lost_ranks
from megatron_prolong.runtime.signals import StopRequest
from megatron_prolong.runtime.watchdog import Watchdog
from megatron_prolong.training import guard
from megatron_prolong.training.checkpoint import CheckpointWriter
from megatron_prolong.training.log import RunLog
from megatron_prolong.training.prepare import StageInput, StageRun, first_state, prepare_stage
from megatron_prolong.training.state import TrainState
from megatron_prolong.training.step import StepMetrics

_LESS_MEMORY = (
    "`prolong plan` shows which layouts fit: more tp or cp, recompute and offload_activations take less "
    "(docs/training.md)"
)


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop, has saved, and can be continued with the same command."""


@dataclass(frozen=True)
class Session:
    """One start of a run: what all its stages share, on this rank.

    Attributes:
        log: on the main rank only.
        sidecar: the `hf/` directory (tokenizer, configs) that every checkpoint takes along.
    """

    recipe: Recipe
    world: World
    log: RunLog | None
    stop: StopRequest
    sidecar: Path


def train_stage(session: Session, stage: Stage, start: StageInput, until: int) -> None:
    """Train `stage` from `start` until a step (its last, or a pause), saving on the way and there. Collective.

    Raises:
        Preempted: asked to stop; a checkpoint of the last finished step is on disk.
        UserError: the checkpoint or the data does not fit the recipe, or the GPU's memory is full.
        RankLost: another rank died.
    """
    log = session.log
    if session.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.world.device)
    with open_stage(session.recipe, stage, start, session.world) as (run, state, watchdog):
        if log:
            mixture = run.mixture.summary()
            log.event(
                "stage_start", stage=stage.name, step=state.step, num_steps=stage.num_steps, mixture=mixture
            )
            if not start.resume:
                log.say(f"stage {stage.name} draws {mixture}")
        bar = log.stage(stage.name, state.step, stage.num_steps) if log else nullcontext()
        with bar, collected_by_hand():
            _walk(session, run, state, until, watchdog)
        if log and until == stage.num_steps:
            log.event("stage_end", stage=stage.name, step=stage.num_steps)


@contextmanager
def open_stage(
    recipe: Recipe, stage: Stage, start: StageInput, world: World
) -> Iterator[tuple[StageRun, TrainState, Watchdog]]:
    """A stage that is ready for its steps, with a watchdog to tell of each. Collective.

    Raises:
        UserError: the checkpoint or the data does not fit the recipe, or the GPU's memory is full.
        RankLost: another rank died.
    """
    rank = world.rank
    with (
        deterministic_kernels(recipe.deterministic),
        megatron(settings_of(recipe, stage).layout, stage.seed) as groups,
        Watchdog(rank) as watchdog,
        naming_lost_ranks(rank, lambda: f"{watchdog.where} of stage {stage.name}"),
        naming_a_full_gpu(lambda: f"rank {rank}, {watchdog.where} of stage {stage.name}", _LESS_MEMORY),
    ):
        run = prepare_stage(recipe, stage, start, world, groups, verified=watchdog.feed)
        watchdog.feed_with(run.model.chunks)
        yield run, together(lambda: first_state(run, start)), watchdog


def _walk(session: Session, run: StageRun, state: TrainState, until: int, watchdog: Watchdog) -> None:
    """The loop: next batch, step, log, checkpoint."""
    stage, spec, log = run.stage, run.recipe.checkpoint, session.log
    writer = CheckpointWriter(
        run.recipe.run_dir / stage.name, spec, session.sidecar, dump_recipe(run.recipe),
        report=(lambda facts: log.event("checkpoint", **facts)) if log else None,
    )  # fmt: skip

    def tell() -> tuple[float, float]:
        return session.stop.asked(), writer.writing()

    started = time.perf_counter()
    for step, (sequences, assignment) in writer.reading(run.batches(state.step)):
        metrics = run.update(step, sequences, assignment, tell)
        asked, writing = metrics.told[:2] if metrics.told else (session.stop.agreed(), 1)
        gc.collect()  # all ranks are here at the same time
        seconds = time.perf_counter() - started
        before, state = state, state.after(stage, sequences, metrics)
        last = state.step == until
        watchdog.feed(state.step + 1)
        writer.poll(writing)
        try:
            guard.check(before, metrics, sequences)
        except UserError as error:  # all ranks judge the same numbers alike
            writer.finish()  # saved before the damage
            raise JointError(str(error), said_here=session.world.is_main) from error
        if log and not metrics.wanted:
            facts = {"tokens": state.tokens, "skipped": state.skipped, "domains": state.domain_tokens}
            log.skipped(stage.name, state.step, stage.num_steps, facts)
        elif log:
            facts = _facts(run, before, state, metrics, sequences, seconds)
            show = last or state.step % run.recipe.logging.every == 0
            log.step(stage.name, state.step, stage.num_steps, facts, show=show)
            if slow := run.stragglers.news():
                log.event("slow_ranks", stage=stage.name, step=state.step, ranks=slow)
                log.say(f"warning: {run.stragglers.describe(slow)}")
        if last or asked or state.step % spec.every == 0:
            writer.save(run.model, run.optimizer, _manifest(run, state))
        if asked and not last:
            writer.finish()
            raise Preempted(f"stopped after step {state.step} of stage {stage.name}")
        if last:
            break
        started = time.perf_counter()  # so that waiting for data counts, and saving does not
    writer.finish()


def _facts(
    run: StageRun,
    before: TrainState,
    state: TrainState,
    metrics: StepMetrics,
    sequences: list[PackedSequence],
    seconds: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    tokens = state.tokens - before.tokens  # fewer than batch_tokens, if packs are not full
    pairs = sum(float(np.square(np.diff(sequence.boundaries)).sum()) for sequence in sequences)
    flops = model_flops(run.model.shape, tokens, pairs)
    return {
        "loss": metrics.loss,
        "lr": metrics.lr,
        "grad_norm": metrics.grad_norm,
        "tokens": state.tokens,
        "valid_tokens": metrics.num_targets,
        "tokens_per_second": tokens / seconds,
        "tflops_per_rank": flops / seconds / run.world.size / 1e12,
        "step_seconds": seconds,
        "skipped": state.skipped,
        "domains": state.domain_tokens,
        "peak_memory_bytes": _peak_memory(run.world),
        "balance": run.stragglers.balance,
    }


def _peak_memory(world: World) -> int:
    """Of this rank: of its GPU since the stage began, or of the process since it started."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _manifest(run: StageRun, state: TrainState) -> dict[str, Any]:
    """Content of a checkpoint's prolong.json."""
    trained = {
        "stage": run.stage.name,
        "step": state.step,
        "sequence_length": run.stage.sequence_length,
        "layout": {**run.settings.layout.model_dump(), "dp": run.groups.dp.size},
        "training": state.to_dict(),
    }
    return manifest(run.model.shape, run.model.config.params_dtype, trained)
