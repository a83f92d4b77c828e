"""The screen, or what takes its place in a log or a pipe."""

from __future__ import annotations

from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH_ELSEWHERE = 200


def screen() -> Console:
    """As wide as the terminal, or as any table where output goes elsewhere. Text is not read as markup:
    [a], or :b: in a path."""
    as_it_is = partial(Console, markup=False, emoji=False)
    console = as_it_is()
    return console if console.is_terminal else as_it_is(width=_WIDTH_ELSEWHERE)


def print_table(table: Table) -> None:
    """Print without a box, the first column to the left, numbers to the right."""
    console = screen()
    if table.title is not None:  # as a line of its own: within a narrow table it would be folded
        console.print(f"  {table.title}", highlight=False, soft_wrap=True)
        table.title = None
    table.box = box.SIMPLE
    for column in table.columns:
        column.overflow = "fold"  # a path that is cut is no use
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
