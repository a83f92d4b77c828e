"""Predicted against reported: writes facts.json and the tables of docs/plan.md between its markers.

python benchmarks/plan/calibrate.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from facts import FACTS, Fact, MemoryFact, max_lengths, nemo, out_of_memory, parameter_facts, prolong, sharded

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"
START, END = "<!-- calibration: start (benchmarks/plan/calibrate.py) -->", "<!-- calibration: end -->"


def main() -> None:
    """Compute, print and write."""
    speed = [*prolong(), *nemo(), *sharded()]
    lengths, memory, weights = max_lengths(), out_of_memory(), parameter_facts()
    tables = "\n\n".join(
        [
            "**Speed and cost**\n\n" + fact_table(speed) + "\n\n" + summary(speed),
            "**Longest sequence that fits**\n\n" + fact_table(lengths) + "\n\n" + summary(lengths),
            "**Out of memory or not**\n\n" + memory_table(memory),
        ]
    )
    print(tables)
    rows = [fact.row() for fact in [*speed, *lengths, *memory, *weights]]
    FACTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if DOCS.exists():
        before, rest = DOCS.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        DOCS.write_text(f"{before}{START}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def fact_table(facts: list[Fact]) -> str:
    """Markdown."""
    lines = ["| what | unit | reported | predicted | error | assumed |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {f.what} | {f.unit} | {f.reported:,.0f} | {f.predicted:,.0f} | {f.error:+.0%} | {f.assumed} |"
        for f in facts
    ]
    return "\n".join(lines)


def memory_table(facts: list[MemoryFact]) -> str:
    """Markdown."""
    lines = [
        "| what | needs (predicted) | has | predicted | reported | source |",
        "|---|---:|---:|---|---|---|",
    ]
    says = {True: "fits", False: "out of memory"}
    lines += [
        f"| {f.what} | {f.needed_gb:.0f} GB | {f.capacity_gb:.0f} GB | {says[f.predicted_to_run]} | "
        f"{says[f.ran]} | {f.source} |"
        for f in facts
    ]
    return "\n".join(lines)


def summary(facts: list[Fact]) -> str:
    """Median and extremes of the error."""
    errors = np.array([fact.error for fact in facts])
    return (
        f"{len(facts)} facts: median error {np.median(errors):+.0%}, median of the absolute error "
        f"{np.median(np.abs(errors)):.0%}, from {errors.min():+.0%} to {errors.max():+.0%}."
    )


if __name__ == "__main__":
    main()
