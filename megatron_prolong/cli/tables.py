"""Tables for the terminal: boxes where there is one, tab-free plain columns in a log."""

from __future__ import annotations

from rich import box
from rich.table import Table

from megatron_prolong.runtime.terminal import screen


def print_table(table: Table) -> None:
    """Print with the first column to the left, numbers to the right."""
    table.box = box.SIMPLE
    for column in table.columns[1:]:
        column.justify = "right"
    screen().print(table)
