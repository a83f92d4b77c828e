"""`prolong runs` and `prolong report`: how runs are doing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.report.history import RunHistory


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where runs are, or one run.")] = Path(
        "runs"
    ),
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs: stage, step, loss, tokens/s and the time left in the stage."""
    from rich.table import Table

    from megatron_prolong.report.history import find_runs, read_run
    from megatron_prolong.runtime.strict_json import dumps
    from megatron_prolong.runtime.terminal import print_table

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the one that holds run directories")
    found = []
    for path in find_runs(directory):
        try:
            found.append(read_run(path))
        except (UserError, OSError) as error:
            # One that is damaged, or closed to us, does not hide the others.
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            print(f"warning: left out: {why}", file=sys.stderr)
    if json_output:
        print(dumps([_facts(run) for run in found], indent=1))
        return
    if not found:
        print(f"{directory}: no runs")
        return
    table = Table("run", "stage", "step", "loss", "tok/s", "left in stage", "last line")
    for run in found:
        table.add_row(*_row(run))
    print_table(table)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    out: Annotated[Path | None, typer.Option(help="File to write; RUN/report.html by default.")] = None,
) -> None:
    """Write one HTML page about a run: curves, tokens by domain, memory, evaluation, recipe."""
    from megatron_prolong.report.history import read_run
    from megatron_prolong.report.page import run_page
    from megatron_prolong.runtime.publish import write_durably

    path = out or run / "report.html"
    write_durably(path, run_page(read_run(run)))
    print(f"wrote {path}")


def _facts(run: RunHistory) -> dict[str, object]:
    stage = run.current
    return {
        "run": str(run.directory),
        "name": run.recipe.name,
        "stage": stage.stage.name,
        "step": stage.step,
        "num_steps": stage.stage.num_steps,
        "loss": stage.last("loss"),
        "tokens_per_second": stage.last("tokens_per_second"),
        "remaining_seconds": run.remaining_seconds,
        "idle_seconds": run.idle_seconds,
        "done": run.done,
    }


def _row(run: RunHistory) -> list[str]:
    from megatron_prolong.report.page import duration

    stage = run.current
    loss, speed = stage.last("loss"), stage.last("tokens_per_second")
    return [
        str(run.directory),
        "done" if run.done else stage.stage.name,
        f"{stage.step}/{stage.stage.num_steps}",
        "–" if loss is None else f"{loss:.4f}",
        "–" if speed is None else f"{speed:,.0f}",
        "–" if run.done else duration(run.remaining_seconds),
        "–" if run.idle_seconds is None else f"{duration(run.idle_seconds)} ago",
    ]
