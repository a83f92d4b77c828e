"""Suite results as one HTML page: the tables, the plot, where the numbers come from."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from megatron_prolong.evaluation.results import Models
from megatron_prolong.evaluation.suite_report import grids, notes
from megatron_prolong.page.html import figure, heading, note, page, table


def suite_page(models: Models, suite: str | None, plot: Path) -> str:
    """HTML of one model's results or several side by side.

    Args:
        plot: the PNG of `plot_suite`, which becomes part of the page.
    """
    picture = base64.b64encode(plot.read_bytes()).decode("ascii")
    image = f'<img alt="scores by length" style="max-width: 100%" src="data:image/png;base64,{picture}">'
    caption = "Above, averages by category and length; below, every task of a model by length."
    body = [note(line) for line in _sources(models)]
    body.append(figure(image, caption))
    for grid in grids(models, suite):
        body += [heading(grid.title), table(grid.headings, grid.rows)]
    body += [note(line) for line in notes(models, suite)]
    return page(f"Evaluation of {', '.join(models)}", body)


def _sources(models: Models) -> Iterator[str]:
    for label, results in models.items():
        paths = dict.fromkeys(result.model for result in results)
        yield f"{label}: {', '.join(paths)}; {len(results)} results."
