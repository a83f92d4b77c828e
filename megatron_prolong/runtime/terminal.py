"""The screen, or what takes its place in a log or a pipe."""

from __future__ import annotations

from rich.console import Console

_WIDTH_ELSEWHERE = 200


def screen() -> Console:
    """As wide as the terminal; with room for any table where output goes elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_ELSEWHERE)
