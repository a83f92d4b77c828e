"""Numbers as people read them."""

from __future__ import annotations


def amount(value: float, decimals: int = 1) -> str:
    """`value` with that many decimals; with two significant digits where it is too small for them: 0.042."""
    return f"{value:.2g}" if 0 < value < 10**-decimals else f"{value:,.{decimals}f}"
