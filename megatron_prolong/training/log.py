"""What a run tells: a live bar on a terminal, lines elsewhere, metrics.jsonl and TensorBoard on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class RunLog:
    """Open files and the terminal of the main rank; every other rank gets `None` instead of one."""

    console: Console
    metrics: IO[str]
    tensorboard: SummaryWriter
    progress: Progress | None = None
    task: TaskID | None = None

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        self.console.print(message, highlight=False)

    def event(self, kind: str, **facts: Any) -> None:
        """A line of metrics.jsonl that is not a step: stage_start, checkpoint, evaluation, …"""
        self._write({"time": time.time(), "event": kind, **facts})

    @contextmanager
    def stage(self, name: str, first_step: int, num_steps: int) -> Iterator[None]:
        """Show the progress of one stage."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            self.progress = progress
            self.task = progress.add_task(name, total=num_steps, completed=first_step, status="")
            yield
            self.progress = None

    def step(self, stage: str, step: int, num_steps: int, facts: dict[str, Any], *, show: bool) -> None:
        """Record one step: `facts` go to metrics.jsonl, the numbers among them to TensorBoard."""
        self._write({"time": time.time(), "stage": stage, "step": step, **facts})
        for key, value in facts.items():
            if isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{stage}/{key}", value, step)
        status = (
            f"loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  grad {facts['grad_norm']:.2f}  "
            f"{facts['tokens_per_second']:,.0f} tok/s"
        )
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, status=status)
        elif show:
            remaining = (num_steps - step) * facts["step_seconds"]
            self.say(f"{stage} {step}/{num_steps}  {status}  ETA {_duration(remaining)}")

    def evaluation(self, stage: str, step: int, scores: Mapping[str, float]) -> None:
        """Record what a checkpoint scored, 0 to 100 by task and length."""
        self.event("evaluation", stage=stage, step=step, scores=scores)
        for name, score in scores.items():
            self.tensorboard.add_scalar(f"{stage}/evaluation/{name}", score, step)
        shown = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
        self.say(f"{stage} {step} evaluation: {shown}")

    def _write(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()


@contextmanager
def open_log(run_dir: Path) -> Iterator[RunLog]:
    """Open the log files of a run, appending to what an earlier start wrote."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (
        (run_dir / "metrics.jsonl").open("a") as metrics,
        SummaryWriter(str(run_dir / "tensorboard")) as tensorboard,
    ):
        yield RunLog(Console(), metrics, tensorboard)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
