"""What a run reports: a live bar on a terminal, lines elsewhere, metrics.jsonl and TensorBoard on disk.

No training stops because its log cannot be written: that is told once. What metrics.jsonl lacks is kept in memory
until it can be written; TensorBoard's writer is done for after an error, so its files go on at the next start.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.run_files import METRICS, TENSORBOARD
from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.runtime.progress import RECENT_STEPS
from megatron_prolong.runtime.strict_json import dumps


@dataclass
class RunLog:
    """Files and the terminal of the main rank; every other rank gets `None` instead of one."""

    console: Console
    metrics: Path  # opened for every line, as an open file may be stale for good
    tensorboard: SummaryWriter | None
    wandb: Any = None  # a wandb.Run, where the recipe asks for one
    progress: Progress | None = None
    task: TaskID | None = None
    unwritten: str = ""  # lines of metrics.jsonl
    was_warned: bool = False
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        self.console.out(message, highlight=False)  # neither wrapped nor read as markup

    def event(self, kind: str, **facts: Any) -> None:
        """A line of metrics.jsonl that is not a step: stage_start, checkpoint, evaluation, …"""
        self._write({"time": time.time(), "event": kind, **facts})

    @contextmanager
    def stage(self, name: str, first_step: int, num_steps: int) -> Iterator[None]:
        """Show the progress of one stage."""
        self.step_seconds.clear()
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # the bar gives way, not the number of steps
            TextColumn("{task.fields[status]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            self.progress = progress
            self.task = progress.add_task(name, total=num_steps, completed=first_step, status="")
            yield
            self.progress = None

    def step(self, stage: str, step: int, num_steps: int, facts: dict[str, Any], *, show: bool) -> None:
        """Record one step: `facts` go to metrics.jsonl, the numbers among them to TensorBoard."""
        self._write({"time": time.time(), "stage": stage, "step": step, **facts})
        self._scalars(
            stage, step, {key: value for key, value in facts.items() if isinstance(value, int | float)}
        )
        self.step_seconds.append(facts["step_seconds"])
        remaining = (num_steps - step) * statistics.median(self.step_seconds)
        status = (
            f"loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  grad {facts['grad_norm']:.2f}  "
            f"{facts['tokens_per_second']:,.0f} tok/s  ETA {timedelta(seconds=round(remaining))}"
        )
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, status=status)
        elif show:
            self.say(f"{stage} {step}/{num_steps}  {status}")

    def skipped(self, stage: str, step: int, num_steps: int, facts: dict[str, Any]) -> None:
        """Record a step that the recipe passes over."""
        self._write({"time": time.time(), "stage": stage, "step": step, **facts})
        self.say(f"{stage} {step}/{num_steps}  skipped (skip_steps)")

    def evaluation(self, stage: str, step: int, scores: Mapping[str, float]) -> None:
        """Record what a checkpoint scored, 0 to 100 by task and length; of held-out text the loss in nats."""
        self.event("evaluation", stage=stage, step=step, scores=scores)
        self._scalars(stage, step, {f"evaluation/{name}": score for name, score in scores.items()})
        shown = "  ".join(f"{name} {score:.4g}" for name, score in scores.items())
        self.say(f"{stage} {step} evaluation: {shown}")

    def _scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        try:
            if self.tensorboard is not None:
                for key, value in values.items():
                    self.tensorboard.add_scalar(f"{stage}/{key}", value, step)
        except OSError as error:  # met by the writer's thread, at any earlier step
            self.tensorboard = None
            self.say(
                f"warning: {TENSORBOARD} cannot be written, and gets nothing more until the next start: {error}"
            )
        if self.wandb is not None:
            self.wandb.log(
                {f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in values.items()}}
            )

    def _write(self, record: dict[str, Any]) -> None:
        self.unwritten += dumps(record) + "\n"
        try:
            with self.metrics.open("a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            self.unwritten = "\n" + self.unwritten.lstrip("\n")  # half of it may be there
            if not self.was_warned:
                self.was_warned = True
                self.say(f"warning: {METRICS} cannot be written; its lines are kept until it can: {error}")


@contextmanager
def open_log(recipe: Recipe) -> Iterator[RunLog]:
    """Open the log files of a run, appending to what an earlier start wrote, less a line it was killed in.

    Raises:
        UserError: the recipe asks for Weights & Biases, which is not installed.
    """
    run_dir = recipe.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / METRICS
    if path.exists():
        written = path.read_bytes()
        os.truncate(path, written.rfind(b"\n") + 1)
    path.touch()
    with (
        _tensorboard(run_dir / TENSORBOARD) as tensorboard,
        _wandb_run(recipe) if recipe.logging.wandb else nullcontext() as wandb,
    ):
        yield RunLog(Console(), path, tensorboard, wandb)


@contextmanager
def _tensorboard(directory: Path) -> Iterator[SummaryWriter | None]:
    try:
        writer = SummaryWriter(str(directory))
    except OSError as error:
        print(f"warning: nothing goes to {directory} until the next start: {error}", file=sys.stderr)
        yield None
        return
    try:
        yield writer
    finally:
        with suppress(OSError):  # of its thread, told when it was met
            writer.close()


@contextmanager
def _wandb_run(recipe: Recipe) -> Iterator[Any]:
    """One wandb run per run directory: a training that continues appends to it. None where it does not begin."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb: not installed; pip install 'megatron-prolong[wandb]', or leave the key out"
        ) from error
    identity = hashlib.sha256(str(recipe.run_dir.resolve()).encode()).hexdigest()[:12]
    try:
        run = wandb.init(
            project=recipe.logging.wandb, name=recipe.name, id=identity, resume="allow", dir=recipe.run_dir,
            config=recipe.model_dump(mode="json"),
        )  # fmt: skip
        for stage in recipe.stages:
            run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")
    except Exception as error:  # of many kinds: no network, no key, no room
        run = nullcontext()
        print(f"warning: nothing goes to Weights & Biases until the next start: {error}", file=sys.stderr)
    with run as begun:
        yield begun
