"""The GPU path of a training step, rehearsed without a GPU: does it run, and what memory does it take?

    python tools/null_cuda/run.py --help            # what it needs: a CUDA build of PyTorch, no GPU
    python benchmarks/gpu/rehearsal.py              # writes benchmarks/gpu/rehearsal.json
    python benchmarks/gpu/rehearsal.py --only 512K  # the cases with that in their name; writes nothing

Kernels do nothing (tools/null_cuda), one process plays one rank of many (one_rank.py), and every other line is
what a GPU would run: our layers on PyTorch's kernels, Megatron's DDP and distributed optimizer, the caching
allocator. Its peak stands beside the planner's prediction. No loss and no time of a GPU is measured; `host_seconds`
is what Python and PyTorch need to issue a step's kernels, on this machine's processor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import measure
import one_rank
from null_cuda import run as null_cuda
from one_rank import CASES, planned_gib


def main(only: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        null_cuda.build(Path(directory))
        for name in (name for name in CASES if only in name):
            measured = measure.in_fresh_process(
                one_rank.__file__,
                {"case": name, "way": "native", "rehearsed": True},
                environment=null_cuda.environment(Path(directory), gib=CASES[name].gib or 400.0),
            )
            if "failed" in measured:
                sys.exit(f"{name}: {measured['failed']}")
            row = {
                "case": name,
                "peak_gib": measured["peak_gib"],
                "reserved_gib": measured["reserved_gib"],
                "host_seconds": measured["seconds"],
                "planned_gib": planned_gib(name),
            }
            row["planned_over_measured"] = round(row["planned_gib"] / row["peak_gib"], 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if not only:
        what = "8B Llama, one rank's training step in bf16 with kernels that do nothing"
        measure.write_result(Path(__file__).with_suffix(".json"), {"what": what, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases with this in their name; writes nothing")
    main(parser.parse_args().only)
