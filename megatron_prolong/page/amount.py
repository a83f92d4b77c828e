"""Numbers as people read them."""

from __future__ import annotations


def amount(value: float, decimals: int = 1) -> str:
    """`value` with so many decimals; where a small model's is less than one of the last, two digits: 0.042."""
    return f"{value:.2g}" if 0 < value < 10**-decimals else f"{value:,.{decimals}f}"
