"""GPU-hours of ProLong's two stages on 64 H100s, by how the documents are shared out.

python benchmarks/balance/stage_hours.py     (about 2 minutes; writes stage_hours.json)

Modelled: matrix products, causal attention and the exchange of keys and values of Llama-3-8B with full
recomputation (CostModel.for_shape: constants and sources in data/balance/cost.py), for `STEPS` batches of the
length distributions of plan/lengths.py, scaled to the stage. Not modelled: elementwise kernels, optimizer,
gradient reduction, FSDP's gathering of weights, data, checkpoints. Hours are therefore a floor; what they are
good for is the ratio between the ways.

The paper reports 2.2K (64K) and 12.2K (512K) H100-hours (arXiv 2410.02660, Table 9; rounded).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from measure import write_result  # noqa: E402
from schemes import (  # noqa: E402
    Outcome,
    in_order,
    megatron_hybrid_cp,
    no_exchange_beyond_need,
    ours,
    prolong_sort,
)
from shapes import LLAMA3_8B  # noqa: E402

from megatron_prolong.data.balance import CostModel  # noqa: E402
from megatron_prolong.data.balance.cost import Lengths  # noqa: E402
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K  # noqa: E402

GPUS = 64
STEPS = 48
RANK_TOKENS = 65_536
NODE = CostModel.for_shape(LLAMA3_8B)  # exchange at 80% of NVLink's 450 GB/s
# Beyond a node all eight 400 Gb/s cards carry the exchange: 80% of 400 GB/s.
FABRIC = dataclasses.replace(NODE, exchange=NODE.exchange * 360 / 320)
# FlashAttention-2, which ProLong ran: 335 TFLOP/s forward and 322 backward instead of 539 and 516 (same source).
FLASH2 = dataclasses.replace(NODE, quadratic=NODE.quadratic * (2 / 335 + 2.5 / 322) / (2 / 539 + 2.5 / 516))
STAGES = {
    "64K": {"mixture": PROLONG_64K, "sequences": 64, "steps": 5000, "paper_hours": 2200, "fixed_cp": 1},
    "512K": {"mixture": PROLONG_512K, "sequences": 16, "steps": 2500, "paper_hours": 12200, "fixed_cp": 8},
}

Scheme = Callable[[Sequence[Lengths]], Outcome | None]


def main() -> None:
    result = {"constants": {"in_node": vars(NODE), "gpus": GPUS, "sampled_steps": STEPS}, "stages": {}}
    for name, stage in STAGES.items():
        result["stages"][name] = _stage(**stage)
        print(name, f"(paper: {stage['paper_hours']} hours)")
        for row in result["stages"][name]["schemes"]:
            print(f"  {row['hours']:8.0f} h  balance {row['balance']:.3f}  {row['scheme']}")
    write_result(HERE / "stage_hours.json", result)


def _stage(mixture: Any, sequences: int, steps: int, paper_hours: float, fixed_cp: int) -> dict[str, Any]:
    batches = [mixture.batch(step, sequences) for step in range(STEPS)]
    dp = GPUS // fixed_cp
    schemes: dict[str, Scheme] = {}
    if fixed_cp > 1:
        schemes[f"fixed cp {fixed_cp}, FSDP, in order"] = lambda b: in_order(
            b, dp, fixed_cp, NODE, sync="micro_batch"
        )
    schemes |= {
        f"ProLong's way: cp {fixed_cp}, FSDP, sorted, FlashAttention-2": lambda b: prolong_sort(
            b, dp, fixed_cp, FLASH2, sync="micro_batch"
        ),
        f"ProLong's way: cp {fixed_cp}, FSDP, sorted, same kernels as ours": lambda b: prolong_sort(
            b, dp, fixed_cp, NODE, sync="micro_batch"
        ),
    }
    for cp in (1, 2, 4, 8, 16, 32, 64):
        if mixture.sequence_length // cp <= RANK_TOKENS:
            schemes[f"ours, dp {GPUS // cp}, cp {cp}"] = lambda b, cp=cp: ours(
                b, GPUS // cp, cp, NODE if cp <= 8 else FABRIC, RANK_TOKENS
            )
    schemes["Megatron-Core 0.16 hybrid cp over all ranks (first 4 batches)"] = lambda b: megatron_hybrid_cp(
        b, GPUS, FABRIC, RANK_TOKENS
    )
    floor = [no_exchange_beyond_need(b, GPUS, NODE, RANK_TOKENS) for b in batches]
    rows = [_row(name, scheme, batches, steps) for name, scheme in schemes.items()]
    perfect = float(np.mean([NODE.work(np.concatenate(b)).sum() / GPUS for b in batches]))
    return {
        "paper_hours": paper_hours,
        "schemes": [row for row in rows if row],
        "hours_any_degree_per_document_at_least": float(np.mean(floor)) * steps * GPUS / 3600,
        "hours_perfect": perfect * steps * GPUS / 3600,
    }


def _row(
    name: str, scheme: Scheme, batches: Sequence[Sequence[Lengths]], steps: int
) -> dict[str, Any] | None:
    if "first 4" in name:
        batches = batches[:4]
    outcomes = [scheme(batch) for batch in batches]
    done = [outcome for outcome in outcomes if outcome]
    if len(done) < len(outcomes):
        return None
    seconds = float(np.mean([outcome.seconds for outcome in done]))
    return {
        "scheme": name,
        "seconds_per_step": seconds,
        "hours": seconds * steps * GPUS / 3600,
        "balance": float(np.mean([outcome.balance for outcome in done])),
    }


if __name__ == "__main__":
    main()
