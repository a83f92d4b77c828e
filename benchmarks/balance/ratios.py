"""Mean over max of the ranks' modelled time, for ProLong's mixtures: in order, ProLong's sort, ours.

`time` is the step's modelled time over that of perfect balance without any exchange.

python benchmarks/balance/ratios.py     (about 5 minutes; writes ratios.json and ratios.md)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from measure import write_result  # noqa: E402
from schemes import (  # noqa: E402
    Outcome,
    best_possible,
    in_order,
    megatron_hybrid_cp,
    ours,
    prolong_sort,
)
from shapes import LLAMA3_8B  # noqa: E402

from megatron_prolong.data.balance import CostModel  # noqa: E402
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K, LengthMixture  # noqa: E402

COST = CostModel.for_shape(LLAMA3_8B)
RANK_TOKENS = (
    65_536  # what ProLong trained with per GPU at 64K; more where one rank must hold a 512K document
)
PAPER_BATCH = {PROLONG_64K.name: 64, PROLONG_512K.name: 16}
GROWN_PER_RANK = 8  # sequences per data-parallel rank; the paper's 64 on 8 GPUs
HYBRID_RANKS = 128  # its scheduler is quadratic; larger worlds take minutes per step


def main() -> None:
    rows = []
    for mixture in (PROLONG_64K, PROLONG_512K):
        for grown in (False, True):
            for dp in (8, 64, 512):
                sequences = PAPER_BATCH[mixture.name]
                if grown and sequences >= GROWN_PER_RANK * dp:
                    continue  # the paper's batch is that large
                sequences = GROWN_PER_RANK * dp if grown else sequences
                steps = int(np.clip(1024 / sequences, 2, 16))
                batches = [mixture.batch(step, sequences) for step in range(steps)]
                for cp in (1, 8, 16):
                    rows.append(_row(mixture, batches, dp, cp))
                    print(_line(rows[-1]), flush=True)
    table = "\n".join([_HEADER, *map(_line, rows)])
    (HERE / "ratios.md").write_text(table + "\n")
    write_result(HERE / "ratios.json", {"cost": vars(COST), "rows": rows})


def _row(mixture: LengthMixture, batches: list[list[np.ndarray]], dp: int, cp: int) -> dict[str, Any]:
    budget = max(RANK_TOKENS, mixture.sequence_length // cp)
    outcomes: dict[str, list[Outcome | None]] = {
        "in_order": [in_order(batch, dp, cp, COST, sync="step") for batch in batches],
        "in_order_fsdp": [in_order(batch, dp, cp, COST, sync="micro_batch") for batch in batches],
        "prolong_sort_fsdp": [prolong_sort(batch, dp, cp, COST, sync="micro_batch") for batch in batches],
        "ours": [ours(batch, dp, cp, COST, budget) for batch in batches],
        "ours_equal_micro_batches": [ours(batch, dp, cp, COST, budget, equal=True) for batch in batches],
    }
    if dp * cp <= HYBRID_RANKS and len(batches[0]) <= 64:
        outcomes["megatron_hybrid_cp"] = [
            megatron_hybrid_cp(batch, dp * cp, COST, RANK_TOKENS) for batch in batches[:2]
        ]
    bounds = [best_possible(batch, dp, COST) for batch in batches]
    row: dict[str, Any] = {
        "mixture": mixture.name,
        "sequences": len(batches[0]),
        "documents": int(np.mean([sum(map(len, batch)) for batch in batches])),
        "dp": dp,
        "cp": cp,
        "steps": len(batches),
        "best_possible": float(np.mean(bounds)),
        # The exchange is work of every rank, so it can lift the ratio a little above what documents allow.
        "ours_of_best_possible": float(
            np.mean([min(o.balance / b, 1) for o, b in zip(outcomes["ours"], bounds, strict=True) if o])
        ),
        "ours_worst_step": min(o.balance for o in outcomes["ours"] if o),
    }
    perfect = np.array([COST.work(np.concatenate(batch)).sum() / (dp * cp) for batch in batches])
    for name, steps in outcomes.items():
        row[name] = float(np.mean([o.balance for o in steps if o])) if all(steps) else None
        row[f"{name}_time"] = (
            sum(o.seconds for o in steps if o) / float(perfect[: len(steps)].sum()) if all(steps) else None
        )
    return row


_HEADER = (
    "| mixture | sequences | dp | cp | in order | in order, FSDP | ProLong's sort, FSDP | ours "
    "| ours, equal micro-batches | best possible | ours / best | time: sort | time: ours |\n"
    + "|---" * 13
    + "|"
)


def _line(row: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        return "–" if row.get(name) is None else f"{row[name]:.3f}"

    names = ("in_order", "in_order_fsdp", "prolong_sort_fsdp", "ours", "ours_equal_micro_batches")
    more = ("best_possible", "ours_of_best_possible", "prolong_sort_fsdp_time", "ours_time")
    numbers = " | ".join(map(cell, (*names, *more)))
    return f"| {row['mixture'].split()[1]} | {row['sequences']} | {row['dp']} | {row['cp']} | {numbers} |"


if __name__ == "__main__":
    main()
