"""The cost model against real processes: two CPU ranks (gloo) run a small Llama's layers, forward and backward.

python benchmarks/balance/cpu_ranks.py     (3 to 10 minutes; writes cpu_ranks.json)

1. Calibrate: time micro-batches of different documents on one rank, fit the cost model.
2. dp = 2: ProLong's 64K mixture, lengths divided by 32; sequences in order against ours. Each rank's measured
   time is compared with the model's prediction, and measured with modelled mean/max.
3. cp = 2: one micro-batch on both ranks, all documents split against our threshold.

Times are processor time of the rank's process, so that other programs on the machine do not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from fit import fit  # noqa: E402
from measure import write_result  # noqa: E402

from megatron_prolong.data.balance import CostModel, assign  # noqa: E402
from megatron_prolong.data.balance.threshold import best_share  # noqa: E402
from megatron_prolong.model.context_parallel import ContextParallel, context_attention  # noqa: E402
from megatron_prolong.model.context_plan import ContextPlan  # noqa: E402
from megatron_prolong.plan.lengths import PROLONG_64K  # noqa: E402

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 256, 4, 2, 688, 1
SEQUENCE = 2048
SHORTER = 65_536 // SEQUENCE
SEQUENCES = 8
STEPS = 3
REPEATS = 2


class Layer(nn.Module):
    """A Llama layer without rotary embedding, which costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HIDDEN // HEADS
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * self.head_dim, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x_TH: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        heads = self.qkv(F.rms_norm(x_TH, (HIDDEN,))).unflatten(1, (-1, self.head_dim))
        x_TH = x_TH + self.out(attend(*heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)).flatten(1))
        gate, up = self.gate_up(F.rms_norm(x_TH, (HIDDEN,))).chunk(2, dim=1)
        return x_TH + self.down(F.silu(gate) * up)


class Rank:
    """One process: its model and the processor time of micro-batches."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        self.rank, self.layers = rank, nn.ModuleList(Layer() for _ in range(LAYERS))

    def seconds(self, plan: ContextPlan, rank: int, group: dist.ProcessGroup | None) -> float:
        """Least of a few runs of forward and backward of `rank`'s slice."""
        context = ContextParallel(plan, rank, group, "all_gather")
        times = []
        for _ in range(REPEATS):
            x_TH = torch.randn(plan.slice_length(rank), HIDDEN, requires_grad=True)
            start = time.process_time()
            y_TH = x_TH
            for layer in self.layers:
                y_TH = layer(y_TH, lambda q, k, v: torch.cat(context_attention(q, k, v, context)))
            y_TH.square().mean().backward()
            times.append(time.process_time() - start)
        return min(times)

    def alone(self, lengths: np.ndarray) -> float:
        return self.seconds(_plan(lengths, 1), 0, None)


def _plan(lengths: np.ndarray, cp: int, threshold: int = 0, owners: Sequence[int] = ()) -> ContextPlan:
    return ContextPlan.build(
        [0, *np.cumsum(lengths).tolist()], cp_size=cp, split_threshold_tokens=threshold, owners=owners
    )


def _everyones(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def calibrate(me: Rank) -> tuple[CostModel, float, dict[str, Any]]:
    """Micro-batches of equal documents: every mixture of linear and quadratic work."""
    lengths = [
        np.full(count, n) for n in (32, 128, 512, 1024, 2048) for count in (1, 2, 4, 16) if n * count <= 4096
    ]
    lengths = [documents for documents in lengths if documents.sum() >= 512]
    seconds = [me.alone(documents) for documents in lengths]
    cost, fixed = fit(lengths, seconds)
    predicted = [fixed + cost.work(documents).sum() for documents in lengths]
    errors = np.abs(np.array(predicted) / seconds - 1)
    report = {
        **vars(cost),
        "fixed": fixed,
        "equal_cost_tokens": cost.equal_cost_tokens,
        "mean_error": float(errors.mean()),
    }
    return _everyones((cost, fixed, report))[0]


def data_parallel(me: Rank, cost: CostModel, fixed: float) -> list[dict[str, Any]]:
    """Both ways, every step: measured and predicted seconds of each rank."""
    rows = []
    for step in range(STEPS):
        batch = [np.maximum(d // SHORTER, 1) for d in PROLONG_64K.batch(step, SEQUENCES)]
        plans = assign(batch, dp=2, cp=1, budget_tokens=SEQUENCE, cost=cost)[me.rank]
        balanced = [np.array([batch[s][d] for s, d in plan.documents]) for plan in plans]
        for name, mine in (("in order", batch[me.rank :: 2]), ("ours", balanced)):
            predicted = sum(fixed + cost.work(lengths).sum() for lengths in mine)
            measured = sum(me.alone(lengths) for lengths in mine)
            ranks = np.array(_everyones((measured, float(predicted))))
            row: dict[str, Any] = {"step": step, "scheme": name}
            for column, kind in enumerate(("measured", "predicted")):
                row[f"{kind}_seconds"] = ranks[:, column].round(4).tolist()
                row[f"{kind}_balance"] = round(float(ranks[:, column].mean() / ranks[:, column].max()), 4)
            rows.append(row)
    return rows


def context_parallel(me: Rank, cost: CostModel, fixed: float) -> list[dict[str, Any]]:
    """Two documents that stay local, one long among short ones, and short ones only."""
    group = dist.group.WORLD
    rows = []
    cases = {
        "one long": np.array([2048]),
        "two long": np.array([2048, 2048]),
        "one long, 32 short": np.array([2048, *[64] * 32]),
        "64 short": np.array([64] * 64),
    }
    exchange = 0.0
    for name, lengths in cases.items():
        share = best_share(lengths, 2, 4096, CostModel(cost.linear, cost.quadratic, exchange))
        row: dict[str, Any] = {"micro_batch": name, "split_threshold_tokens": share.split_threshold_tokens}
        ours = _plan(lengths, 2, share.split_threshold_tokens, share.owners)
        for scheme, plan in (("all_split", _plan(lengths, 2)), ("ours", ours)):
            dist.barrier()
            seconds = _everyones(me.seconds(plan, me.rank, group))
            row[f"{scheme}_seconds"] = [round(value, 4) for value in seconds]
        row["gain"] = round(max(row["all_split_seconds"]) / max(row["ours_seconds"]), 3)
        if name == "one long":  # what splitting costs beyond half the work: the exchange of this machine
            beyond = max(row["all_split_seconds"]) - fixed - cost.work(lengths).sum() / 2
            exchange = max(float(beyond), 0.0) / (2048 / 2)
            row["exchange_seconds_per_token"] = exchange
        rows.append(row)
    return rows


def _main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    me = Rank(rank)
    me.alone(np.full(4, 512))  # warm up
    cost, fixed, calibration = calibrate(me)
    rows = data_parallel(me, cost, fixed)
    cp_rows = context_parallel(me, cost, fixed)
    dist.destroy_process_group()
    if rank:
        return
    measured, predicted = (
        np.array([row[f"{kind}_seconds"] for row in rows]) for kind in ("measured", "predicted")
    )
    summary = {
        "prediction_error_mean": float(np.abs(predicted / measured - 1).mean()),
        "prediction_error_max": float(np.abs(predicted / measured - 1).max()),
    }
    for scheme in ("in order", "ours"):
        for kind in ("measured", "predicted"):
            values = [row[f"{kind}_balance"] for row in rows if row["scheme"] == scheme]
            summary[f"{kind}_balance, {scheme}"] = float(np.mean(values))
    print(summary)
    write_result(
        HERE / "cpu_ranks.json",
        {"calibration": calibration, "summary": summary, "data_parallel": rows, "context_parallel": cp_rows},
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_main, (f"{directory}/store",), nprocs=2)
