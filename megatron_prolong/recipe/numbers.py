"""Numbers as people write them in recipes: 64K, 4M, 20B, 1e-5, 1.28e8.

K, M and B are binary (1024, 1024², 1024³), as in the ProLong paper (footnote 2): 64K is 65,536 tokens.
YAML 1.1 reads `1e-5` (no dot) as text, so plain numbers arrive here as text too. `010` is refused: ten, or octal 8?
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "B": 2**30}
_NUMBER = re.compile(
    r"\s*([+-]?(?:(?!0[\d_])\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([KMB]?)\s*", re.IGNORECASE
)


def parse_number(value: object) -> float | int:
    """`value` as a number; an int wherever the number is whole. Raises ValueError with the rule."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        digits, unit = match[1].replace("_", ""), match[2].upper()
        value = int(digits) * _UNITS[unit] if digits.lstrip("+-").isdigit() else float(digits) * _UNITS[unit]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number, such as 4, 0.1, 1e-5, 64K or 20B (K, M, B are binary)")
    if not abs(value) < 1e300:  # nor infinite, nor NaN, nor an int that no float can hold
        raise ValueError("must be a finite number")
    return int(value) if value == int(value) else value


def parse_count(value: object) -> int:
    """`value` as a whole number: 64K → 65536, 1e3 → 1000, 0.5M → 524288. Raises ValueError."""
    number = parse_number(value)
    if not isinstance(number, int):
        raise ValueError("must be a whole number, such as 125, 64K or 4M")
    return number


def parse_real(value: object) -> float:
    """`value` as a float. Raises ValueError, for the units of `parse_count` too: 8M would be 8,388,608."""
    if isinstance(value, str) and value.rstrip().upper().endswith(("K", "M", "B")):
        raise ValueError("must be written without a unit, as 8e6: K, M and B count in powers of 1024")
    return float(parse_number(value))


def parse_steps(value: object) -> str:
    """Steps and ranges of steps in one text: 1203, "1203, 1210-1215", [1203, 1210-1215]. Raises ValueError."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    texts = ["".join(str(item).split()) for item in items]
    if any(not re.fullmatch(r"[1-9]\d{0,11}(-[1-9]\d{0,11})?", text) for text in texts if text):
        raise ValueError("must be steps and ranges of steps, such as 1203 or 1203, 1210-1215")
    return ", ".join(text for text in texts if text)


def steps_of(text: str) -> list[range]:
    """What `parse_steps` made, as ranges; one whose end is before its beginning is empty."""
    bounds = [item.partition("-") for item in text.split(", ") if item]
    return [range(int(first), int(last or first) + 1) for first, _, last in bounds]


def format_count(count: int) -> str:
    """The shortest exact spelling: 65536 → '64K', 125 → '125', 20·2³⁰ → '20B'."""
    for unit in "BMK":
        if count and count % _UNITS[unit] == 0:
            return f"{count // _UNITS[unit]}{unit}"
    return str(count)


Count = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | str)]
"""A whole number that may be written 64K, 4M or 20B."""

Steps = Annotated[str, BeforeValidator(parse_steps, json_schema_input_type=int | str | list[int | str])]
"""Steps and ranges of steps, counted from 1, that may be written 1203 or [1203, 1210-1215]."""

Real = Annotated[float, BeforeValidator(parse_real, json_schema_input_type=float | str)]
"""A float that may be written 1e-5 or 8e6."""
