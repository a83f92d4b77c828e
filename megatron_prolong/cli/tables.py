"""Tables for the terminal: boxes where there is one, tab-free plain columns in a log."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print at the terminal's width, or unlimited when the output is not a terminal."""
    table.box = box.SIMPLE
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
