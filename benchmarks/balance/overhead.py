"""How long `assign` takes: a step's worth of short documents, and ProLong's own batches.

python benchmarks/balance/overhead.py     (half a minute; writes overhead.json)

Processor time of one core, least of five: the thread that reads ahead of training does it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from measure import write_result  # noqa: E402
from shapes import LLAMA3_8B  # noqa: E402

from megatron_prolong.data.balance import CostModel, assign  # noqa: E402
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K  # noqa: E402

COST = CostModel.for_shape(LLAMA3_8B)


def short_documents(count: int = 20_000, tokens: int = 4 * 2**20) -> list[np.ndarray]:
    """`count` log-normal documents of `tokens` tokens in all, in 64 sequences."""
    lengths = np.random.default_rng(0).lognormal(0, 0.8, count)
    return np.array_split(np.maximum((lengths / lengths.sum() * tokens).astype(np.int64), 1), 64)


def main() -> None:
    batches = {
        "20,000 short documents, 4M tokens": (short_documents(), 65_536),
        "ProLong 64K, 4M tokens": (PROLONG_64K.batch(0, 64), 65_536),
        "ProLong 512K, 8M tokens": (PROLONG_512K.batch(0, 16), 524_288),
    }
    rows: list[dict[str, Any]] = []
    for name, (batch, longest) in batches.items():
        for dp, cp in ((8, 1), (8, 8), (64, 1), (64, 8), (4, 16)):
            for equal in (False, True):
                budget = max(65_536, longest // cp)
                times = []
                for _ in range(5):
                    start = time.process_time()
                    assign(batch, dp=dp, cp=cp, budget_tokens=budget, cost=COST, equal_micro_batches=equal)
                    times.append(time.process_time() - start)
                rows.append(
                    {"batch": name, "documents": sum(map(len, batch)), "dp": dp, "cp": cp,
                     "equal_micro_batches": equal, "seconds": round(min(times), 4)}
                )  # fmt: skip
                print(rows[-1], flush=True)
    write_result(HERE / "overhead.json", {"rows": rows})


if __name__ == "__main__":
    main()
