"""`prolong eval compare` and `judge`: what is done with results that are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.cli.eval import going_on, models_of, one_of

if TYPE_CHECKING:
    from megatron_prolong.evaluation.results import Models


def compare(
    directories: Annotated[
        list[str], typer.Argument(metavar="[LABEL=]RESULTS...", help="Folders of results.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write compare.json, .png and .html here.")] = None,
    suite: Annotated[str | None, typer.Option(help="Show published scores of this suite.")] = None,
) -> None:
    """Results side by side: the table base → 64K → 512K → SFT with changes and confidence intervals."""
    from megatron_prolong.evaluation.results import read_results
    from megatron_prolong.evaluation.suites import SUITES

    if suite is not None:
        one_of("--suite", suite, tuple(SUITES))
    results = {label: read_results(Path(path)) for label, path in models_of(directories[0], directories[1:])}
    report(results, suite, out, name="compare")


def judge(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of one model's results.")],
    server: Annotated[str, typer.Option(help="OpenAI-compatible server.")],
    helmet: Annotated[
        Path, typer.Option(help="Checkout of princeton-nlp/HELMET, for the judge's instructions.")
    ],
    model: Annotated[str, typer.Option(help="Judging model.")] = "gpt-4o-2024-05-13",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
) -> None:
    """Let a model judge long answers and summaries (HELMET's procedure); cached, resumable."""
    from megatron_prolong.evaluation.client import Client
    from megatron_prolong.evaluation.judge import Judge, judge_results

    client = Client(server, concurrency=concurrency)
    with going_on():
        written = judge_results(results, Judge(client, model, results / "judge_cache.jsonl"), helmet)
    print("\n".join(f"wrote {path}" for path in written) or "nothing to judge")


def report(results: Models, suite: str | None, out: Path | None, name: str = "suite") -> None:
    """Tables and notes on the terminal; with `out`, also NAME.json, NAME.png and NAME.html there."""
    from megatron_prolong.evaluation.suite_page import suite_page
    from megatron_prolong.evaluation.suite_plot import plot_suite
    from megatron_prolong.evaluation.suite_report import print_suite, summary
    from megatron_prolong.runtime.publish import write_durably
    from megatron_prolong.runtime.strict_json import write_json

    print_suite(results, suite)
    if out is not None:
        data, plot, page = (out / f"{name}.{suffix}" for suffix in ("json", "png", "html"))
        write_json(data, summary(results, suite))
        plot_suite(results, suite, plot)
        write_durably(page, suite_page(results, suite, plot))
        print(f"wrote {data}, {plot} and {page}")
