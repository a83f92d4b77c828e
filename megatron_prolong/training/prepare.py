"""Set a stage up at its layout: the model, the optimizer and the batch stream, and what it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_prolong.data.balance import Assignment, CostModel
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.data.stream import stream
from megatron_prolong.errors import UserError
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import load_weights, load_weights_and_optimizer
from megatron_prolong.mcore.config import precision_problem
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.mcore.optimizer import MegatronOptimizer, build_optimizer
from megatron_prolong.recipe import fp8
from megatron_prolong.recipe.schema import Recipe, Settings, Stage, settings_of
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime.agreement import against_main, together
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.stopwatch import Stopwatch
from megatron_prolong.training.balance import micro_batches, share_out
from megatron_prolong.training.checkpoint import verify_checkpoint
from megatron_prolong.training.run_directory import Checkpoint, chain_status
from megatron_prolong.training.schedule import learning_rate
from megatron_prolong.training.state import TrainState
from megatron_prolong.training.step import StepMetrics, train_step
from megatron_prolong.training.stragglers import Stragglers


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
        """The model's shape in this stage: the incoming one with the stage's positions and at least its length."""
        shape = ModelShape.from_dict(self.checkpoint.manifest["shape"])
        return shape.replace(
            rope_base=stage.rope_base or shape.rope_base,
            rope_scaling=stage.yarn.scaling if stage.yarn else shape.rope_scaling,
            max_length=max(shape.max_length, stage.sequence_length),
        )


@dataclass(frozen=True)
class StageRun:
    """Everything the loop of one stage works with, on this rank."""

    recipe: Recipe
    stage: Stage
    settings: Settings
    world: World
    groups: ParallelGroups
    model: StageModel
    optimizer: MegatronOptimizer
    mixture: Mixture
    cost: CostModel
    clock: Stopwatch
    stragglers: Stragglers

    def batches(self, first_step: int) -> Iterator[tuple[int, tuple[list[PackedSequence], Assignment]]]:
        """(step, (its global batch, which rank trains on which document)) of every step from `first_step` on."""

        def dealt(sequences: list[PackedSequence]) -> tuple[list[PackedSequence], Assignment]:
            return sequences, share_out(sequences, self.groups, self.stage.micro_batch_length, self.cost)

        return stream(self.mixture, first_step, dealt)

    def update(
        self,
        step: int,
        sequences: list[PackedSequence],
        assignment: Assignment,
        tell: Callable[[], Sequence[float]] = tuple,
    ) -> StepMetrics:
        """Make update `step` (counted from 0) with its global batch. Collective.

        Args:
            tell: see `forward_backward`; the ranks' times come after it in `told` of the result.
        """
        stage, recipe, lr = self.stage, self.recipe, learning_rate(self.stage, step)
        if stage.skips(step + 1):
            return StepMetrics(math.nan, math.nan, lr, 0, updated=False, wanted=False)

        def tell_times_too() -> list[float]:
            times = [0.0] * self.world.size
            times[self.world.rank] = self.clock.seconds()
            return [*tell(), *times]

        self.clock.start()
        batches = micro_batches(
            sequences, assignment, self.groups, self.settings.layout, self.world.device,
            token_multiple=fp8.TOKEN_MULTIPLE if self.settings.precision == "fp8" else 1,
        )  # fmt: skip
        metrics = train_step(
            self.model, self.optimizer, batches, self.groups,
            spec=recipe.optimizer, lr=lr, computed=self.clock.stop, tell=tell_times_too,
        )  # fmt: skip
        planned = [sum(plan.share.seconds for plan in plans) for plans in assignment]
        self.stragglers.note(metrics.told[-self.world.size :], planned)
        return metrics


def prepare_stage(
    recipe: Recipe,
    stage: Stage,
    start: StageInput,
    world: World,
    groups: ParallelGroups,
    verified: Callable[[], None] = lambda: None,
) -> StageRun:
    """Build model, optimizer and batch stream; load what the stage starts from.

    Args:
        verified: called between the two times that the checkpoint is read, each of which may take an hour.
    """
    settings = settings_of(recipe, stage)
    layout = settings.layout
    shape = start.shape(stage)
    mixture = together(lambda: Mixture.of_stage(stage, shape.vocab_size))
    against_main(mixture.fingerprint(), partial(_refuse_other_data, stage))
    model = build_model(
        shape,
        layout,
        precision=settings.precision,
        recompute=settings.recompute,
        fp8_recipe=recipe.fp8_recipe,
        fp8_parameters=recipe.fp8_parameters,
        loss_chunk_tokens=recipe.loss_chunk_tokens,
        offload_activations=settings.offload_activations,
        rank_tokens=-(-stage.micro_batch_length // layout.cp),
    )
    verify_checkpoint(start.checkpoint.directory)
    verified()
    if start.optimizer:
        optimizer = build_optimizer(model, recipe.optimizer, layout, lr=stage.lr)
        load_weights_and_optimizer(start.checkpoint.directory, model, optimizer)
    else:
        # The optimizer copies its fp32 main weights from the model, so the weights come first.
        load_weights(start.checkpoint.directory, model)
        optimizer = build_optimizer(model, recipe.optimizer, layout, lr=stage.lr)
    cost = CostModel.for_shape(shape)
    clock, stragglers = Stopwatch(world.device), Stragglers.meet(world, groups)
    return StageRun(
        recipe, stage, settings, world, groups, model, optimizer, mixture, cost, clock, stragglers
    )


def refuse_precision(recipe: Recipe) -> None:
    """Raises UserError where a stage that is not done has a precision that this machine cannot run."""
    for status in chain_status(recipe, recipe.run_dir):
        settings = settings_of(recipe, status.stage)
        problem = precision_problem(settings.precision, recipe.fp8_recipe, settings.layout.cp)
        if problem and status.word != "done":
            raise UserError(f"stage {status.stage.name}: {problem}")


def _refuse_other_data(stage: Stage, main: str, own: str) -> None:
    """All ranks must see the same samples: each takes its share of one global batch."""
    if own != main:
        raise UserError(
            f"stage {stage.name}: its data here is not rank 0's (other samples behind the same recipe); copy it "
            "to this node again, or read it from a shared disk"
        )


def first_state(run: StageRun, start: StageInput) -> TrainState:
    """A fresh state, or the one saved with the stage's own checkpoint.

    Raises:
        UserError: the batch stream is not the same any more, or another version wrote the state.
    """
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
