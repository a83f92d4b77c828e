"""Counts of tokens on the command line, as 64K or 512: parsers for typer, which names the option if one refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import typer


def at_least(least: int) -> Callable[[str], int]:
    """Of one count."""

    def parse(text: str) -> int:
        from megatron_prolong.recipe.numbers import parse_count

        try:
            count = parse_count(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text}: {error}") from None
        if count < least:
            raise typer.BadParameter(f"{text}: must be at least {least} (8K is 8,192)")
        return count

    return parse


def each_at_least(least: int) -> Callable[[str], list[int]]:
    """Of counts with commas between them: ascending, each once."""
    parse = at_least(least)
    return lambda text: sorted({parse(part) for part in text.split(",")})


class OfDomain(NamedTuple):
    """A length for one domain; for all with the name ""."""

    domain: str
    tokens: int


def of_domain(text: str) -> OfDomain:
    """Of `64K` or `books=32K`."""
    domain, _, tokens = text.rpartition("=")
    return OfDomain(domain, at_least(0)(tokens))
