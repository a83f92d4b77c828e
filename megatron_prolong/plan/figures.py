"""The figures of a layout as people read them: in tables and on the page."""

from __future__ import annotations

from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.search import Candidate


def amount(value: float, decimals: int = 1) -> str:
    """`value` with so many decimals; where a small model's is less than one of the last, two digits: 0.042."""
    return f"{value:.2g}" if 0 < value < 10**-decimals else f"{value:,.{decimals}f}"


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
