"""The figures of a layout as people read them: in tables and on the page."""

from __future__ import annotations

from megatron_prolong.page.amount import amount
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.search import Candidate


def figures(candidate: Candidate, gpu: Gpu, num_steps: int) -> list[str]:
    """GB, seconds per step, tokens/s/GPU, MFU, GPU-hours, USD of a layout that runs."""
    assert candidate.time is not None
    hours = candidate.gpu_hours(num_steps)
    return [
        f"{'!' * candidate.tight}{amount(candidate.needed_bytes / 1e9)}",
        amount(candidate.time.total),
        f"{candidate.throughput:,.0f}",
        f"{candidate.mfu:.1%}",
        amount(hours, 0),
        amount(hours * gpu.price_per_hour, 0),
    ]
