"""One stage: build the model at the stage's layout, load what it carries over, and walk its steps."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.data.stream import stream
from megatron_prolong.errors import UserError
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import load_weights, load_weights_and_optimizer
from megatron_prolong.mcore.groups import ParallelGroups, megatron
from megatron_prolong.mcore.optimizer import MegatronOptimizer, build_optimizer
from megatron_prolong.plan.flops import model_flops
from megatron_prolong.recipe import fp8
from megatron_prolong.recipe.load import dump_recipe
from megatron_prolong.recipe.schema import (
    Layout,
    Recipe,
    Stage,
    layout_of,
    offload_of,
    precision_of,
    recompute_of,
)
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime.agreement import against_main
from megatron_prolong.runtime.garbage import collected_by_hand
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.lost_rank import naming_lost_ranks
from megatron_prolong.runtime.watchdog import Watchdog
from megatron_prolong.training import guard
from megatron_prolong.training.balance import micro_batches, share_out
from megatron_prolong.training.checkpoint import CheckpointWriter, verify_checkpoint
from megatron_prolong.training.log import RunLog
from megatron_prolong.training.run_directory import Checkpoint
from megatron_prolong.training.schedule import learning_rate
from megatron_prolong.training.state import LOSS_WINDOW, TrainState, versions
from megatron_prolong.training.step import StepMetrics, train_step

# From one micro-batch to the next, which takes minutes (a step of 8M tokens takes hours on a few GPUs); saving a
# checkpoint of 70B is in it too.
HANG_SECONDS = 3600.0


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop, has saved, and can be continued with the same command."""


@dataclass(frozen=True)
class Session:
    """One start of a run: what all its stages share, on this rank.

    Attributes:
        log: on the main rank only.
        stop_requested: whether to save and stop. Collective.
        sidecar: the `hf/` directory (tokenizer, configs) that every checkpoint takes along.
    """

    recipe: Recipe
    world: World
    log: RunLog | None
    stop_requested: Callable[[], bool]
    sidecar: Path


@dataclass(frozen=True)
class StageInput:
    """Where a stage starts from.

    Attributes:
        checkpoint: whose weights are loaded.
        optimizer: load Adam's moments from it too.
        resume: it is this stage's own checkpoint, so its TrainState continues.
    """

    checkpoint: Checkpoint
    optimizer: bool
    resume: bool

    def shape(self, stage: Stage) -> ModelShape:
        """The model's shape in this stage: the incoming one with the stage's RoPE base and at least its length."""
        shape = ModelShape.from_dict(self.checkpoint.manifest["shape"])
        return shape.replace(
            rope_base=stage.rope_base or shape.rope_base,
            max_length=max(shape.max_length, stage.sequence_length),
        )


@dataclass(frozen=True)
class StageRun:
    """Everything the loop of one stage works with, on this rank."""

    recipe: Recipe
    stage: Stage
    layout: Layout
    world: World
    groups: ParallelGroups
    model: StageModel
    optimizer: MegatronOptimizer
    mixture: Mixture
    cost: CostModel

    def update(self, step: int, sequences: list[PackedSequence]) -> StepMetrics:
        """Make update `step` (counted from 0) with its global batch. Collective."""
        stage, recipe = self.stage, self.recipe
        assignment = share_out(sequences, self.groups, stage.micro_batch_length, self.cost)
        batches = micro_batches(
            sequences, assignment, self.groups, self.layout, self.cost, self.world.device,
            token_multiple=fp8.TOKEN_MULTIPLE if precision_of(recipe, stage) == "fp8" else 1,
        )  # fmt: skip
        return train_step(
            self.model, self.optimizer, batches, self.groups,
            spec=recipe.optimizer, lr=learning_rate(stage, step),
        )  # fmt: skip


def train_stage(session: Session, stage: Stage, start: StageInput, until: int) -> None:
    """Train `stage` from `start` until a step (its last, or a pause), saving on the way and there. Collective.

    Raises:
        Preempted: asked to stop; a checkpoint of the last finished step is on disk.
        UserError: the checkpoint or the data does not fit the recipe.
        RankLost: another rank died.
    """
    layout, rank, log = layout_of(session.recipe, stage), session.world.rank, session.log
    with (
        megatron(layout, stage.seed) as groups,
        Watchdog(rank, HANG_SECONDS) as watchdog,
        naming_lost_ranks(rank, lambda: f"{watchdog.where} of stage {stage.name}"),
    ):
        run = prepare_stage(session.recipe, stage, start, layout, session.world, groups)
        for chunk in run.model.chunks:
            chunk.register_forward_pre_hook(lambda *_: watchdog.feed())
        state = first_state(run, start)
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


def _walk(session: Session, run: StageRun, state: TrainState, until: int, watchdog: Watchdog) -> None:
    """The loop: next batch, step, log, checkpoint."""
    stage, spec, log = run.stage, run.recipe.checkpoint, session.log
    writer = CheckpointWriter(
        run.recipe.run_dir / stage.name, spec, session.sidecar, dump_recipe(run.recipe),
        report=(lambda facts: log.event("checkpoint", **facts)) if log else None,
    )  # fmt: skip
    started = time.perf_counter()
    for step, sequences in stream(run.mixture, state.step):
        metrics = run.update(step, sequences)
        gc.collect()  # all ranks are here at the same time
        before, state = state, _advance(state, stage, sequences, metrics)
        watchdog.feed(state.step + 1)
        writer.poll()
        try:
            guard.check(before, metrics, sequences)
        except UserError:
            writer.finish()  # saved before the damage, and every rank is here
            raise
        if log:
            facts = _facts(run, state, metrics, sequences, time.perf_counter() - started)
            log.step(
                stage.name, state.step, stage.num_steps, facts, show=step % run.recipe.logging.every == 0
            )
        last = state.step == until
        stopping = session.stop_requested()
        if last or stopping or state.step % spec.every == 0:
            writer.save(run.model, run.optimizer, _manifest(run, state))
        if stopping and not last:
            writer.finish()
            raise Preempted(f"stopped after step {state.step} of stage {stage.name}")
        if last:
            break
        started = time.perf_counter()  # so that waiting for data counts, and saving does not
    writer.finish()


def prepare_stage(
    recipe: Recipe, stage: Stage, start: StageInput, layout: Layout, world: World, groups: ParallelGroups
) -> StageRun:
    """Build model, optimizer and batch stream; load what the stage starts from."""
    shape = start.shape(stage)
    mixture = Mixture.of_stage(stage, shape.vocab_size)
    against_main(mixture.fingerprint(), partial(_refuse_other_data, stage))
    model = build_model(
        shape,
        layout,
        precision=precision_of(recipe, stage),
        recompute=recompute_of(recipe, stage),
        fp8_recipe=recipe.fp8_recipe,
        fp8_parameters=recipe.fp8_parameters,
        loss_chunk_tokens=recipe.loss_chunk_tokens,
        offload_activations=offload_of(recipe, stage),
        rank_tokens=-(-stage.micro_batch_length // layout.cp),
    )
    verify_checkpoint(start.checkpoint.directory)
    if start.optimizer:
        _refuse_other_optimizer(start.checkpoint, layout)
        optimizer = build_optimizer(model, recipe.optimizer, layout, lr=stage.lr)
        load_weights_and_optimizer(start.checkpoint.directory, model, optimizer)
    else:
        # The optimizer copies its fp32 main weights from the model, so the weights come first.
        load_weights(start.checkpoint.directory, model)
        optimizer = build_optimizer(model, recipe.optimizer, layout, lr=stage.lr)
    cost = CostModel.for_shape(shape)
    return StageRun(recipe, stage, layout, world, groups, model, optimizer, mixture, cost)


def _refuse_other_data(stage: Stage, main: str, own: str) -> None:
    """Ranks that read other samples would each train on its own."""
    if own != main:
        raise UserError(
            f"stage {stage.name}: its data here is not rank 0's (other samples behind the same recipe); copy it "
            "to this node again, or read it from a shared disk"
        )


def _refuse_other_optimizer(checkpoint: Checkpoint, layout: Layout) -> None:
    """Megatron's sharded and unsharded optimizers have files of their own; any other change of layout is fine."""
    saved = checkpoint.manifest["layout"]["distributed_optimizer"]
    if saved != layout.distributed_optimizer:
        raise UserError(
            f"{checkpoint.directory} was saved with layout.distributed_optimizer: {str(saved).lower()}, and its "
            "optimizer state can only continue with that; set it so, or start the stage with carry.optimizer: false"
        )


def first_state(run: StageRun, start: StageInput) -> TrainState:
    """A fresh state, or the one saved with the stage's own checkpoint if the batch stream is still the same."""
    fingerprint = run.mixture.fingerprint()
    if not start.resume:
        return TrainState(stage=run.stage.name, stream=fingerprint)
    try:
        state = TrainState.from_dict(start.checkpoint.manifest["training"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{start.checkpoint.directory}: this version cannot continue from its training state ({error!r}); use "
            "the version that wrote it (named in its prolong.json)"
        ) from error
    if state.stream != fingerprint:
        raise UserError(
            f"stage {run.stage.name} cannot continue from {start.checkpoint.directory}: its data has changed "
            "(other samples, another order of the domains, or other proportions), so the batch stream would jump; "
            "restore the data, or start a new run_dir"
        )
    return state


def _advance(
    state: TrainState, stage: Stage, sequences: list[PackedSequence], metrics: StepMetrics
) -> TrainState:
    domains, names = Counter(state.domain_tokens), stage.domain_names
    for sequence in sequences:
        domain = sequence.identity.domain
        domains[names.get(domain, domain)] += sequence.num_tokens
    return replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + stage.batch_tokens,
        skipped=state.skipped + (not metrics.updated),
        skipped_in_a_row=0 if metrics.updated else state.skipped_in_a_row + 1,
        recent_losses=[*state.recent_losses, *[metrics.loss] * metrics.updated][-LOSS_WINDOW:],
        domain_tokens=dict(domains),
    )


def _facts(
    run: StageRun, state: TrainState, metrics: StepMetrics, sequences: list[PackedSequence], seconds: float
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    pairs = sum(float(np.square(np.diff(sequence.boundaries)).sum()) for sequence in sequences)
    flops = model_flops(run.model.shape, run.stage.batch_tokens, pairs)
    return {
        "loss": metrics.loss,
        "lr": metrics.lr,
        "grad_norm": metrics.grad_norm,
        "tokens": state.tokens,
        "valid_tokens": metrics.num_targets,
        "tokens_per_second": run.stage.batch_tokens / seconds,
        "tflops_per_rank": flops / seconds / run.world.size / 1e12,
        "step_seconds": seconds,
        "skipped": state.skipped,
        "domains": state.domain_tokens,
        "peak_memory_bytes": _peak_memory(run.world),
    }


def _peak_memory(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _manifest(run: StageRun, state: TrainState) -> dict[str, Any]:
    """Content of a checkpoint's prolong.json."""
    return {
        "format": 1,
        "kind": "training",
        "shape": run.model.shape.to_dict(),
        "dtype": dtype_name(run.model.config.params_dtype),
        "stage": run.stage.name,
        "step": state.step,
        "sequence_length": run.stage.sequence_length,
        "layout": {**run.layout.model_dump(), "dp": run.groups.dp.size},
        "training": state.to_dict(),
        "versions": versions(),
    }
