"""The GPU path of a training step, rehearsed without a GPU: does it run, and what memory does it take?

    python tools/null_cuda/run.py --help            # what it needs: a CUDA build of PyTorch, no GPU
    python benchmarks/gpu/rehearsal.py              # writes benchmarks/gpu/rehearsal.json
    python benchmarks/gpu/rehearsal.py --only 512K  # the cases with that in their name; writes nothing

Kernels do nothing (tools/null_cuda), one process plays one rank of many (PyTorch's fake process group), and every
other line is what a GPU would run: our layers on PyTorch's kernels, Megatron's DDP and distributed optimizer, the
caching allocator. Its peak stands beside the planner's prediction. No loss and no time of a GPU is measured;
`host_seconds` is what Python and PyTorch need to issue a step's kernels, on this machine's processor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import measure
from null_cuda import run as null_cuda
from throughput import PROLONG_8B, training_step

from megatron_prolong.plan.job import Job
from megatron_prolong.plan.memory import peak_memory
from megatron_prolong.recipe.schema import Layout

GIB = 2**30
K = 1024
BAG = [32 * K, 20 * K, 7 * K, 3 * K, 1 * K, 700, 324]  # a 64K pack of many documents
# name: (ranks, layout, documents of each micro-batch, recompute, options)
CASES: dict[str, tuple[int, dict[str, Any], list[list[int]], str, dict[str, Any]]] = {
    "16K, nothing recomputed": (32, {}, [[16 * K]], "none", {}),
    "16K, selective": (32, {}, [[16 * K]], "selective", {}),
    "64K, one document": (32, {}, [[64 * K]], "full", {}),
    "64K, packs of many documents": (32, {}, [BAG, [64 * K], BAG], "full", {}),
    "64K, tp 2 cp 4": (32, {"tp": 2, "cp": 4}, [[64 * K]], "none", {}),
    "64K, tp 4 cp 2, a bag split and whole": (32, {"tp": 4, "cp": 2, "cp_exchange": "p2p"}, [BAG], "selective", {}),
    "512K, cp 8 p2p": (8, {"cp": 8, "cp_exchange": "p2p"}, [[512 * K]], "full", {}),
    "512K, cp 8 all_gather": (8, {"cp": 8}, [[512 * K]], "full", {}),
    "512K, cp 8 a2a": (8, {"cp": 8, "cp_exchange": "a2a"}, [[512 * K]], "full", {}),
    "512K, cp 8 a2a+p2p": (8, {"cp": 8, "cp_exchange": "a2a+p2p"}, [[512 * K]], "full", {}),
    "512K, cp 8 a2a, offload, 80 GiB": (8, {"cp": 8, "cp_exchange": "a2a"}, [[512 * K]], "full", {"offload": True}),
    "512K, tp 4 cp 2 p2p": (64, {"tp": 4, "cp": 2, "cp_exchange": "p2p"}, [[512 * K]], "full", {}),
    "1M, tp 4 cp 8 p2p": (32, {"tp": 4, "cp": 8, "cp_exchange": "p2p"}, [[1024 * K]], "full", {}),
}  # fmt: skip


def rehearse(name: str) -> None:
    """Two steps of one rank; prints its peak as JSON. Runs under the null CUDA runtime."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_prolong.mcore import schedule
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.replace import replaced

    reduce = schedule._reduce

    def counted(*losses: Any) -> tuple[float, int]:
        """Kernels that do nothing count no targets either, and such a batch would be skipped."""
        reduce(*losses)
        return 0.0, 1

    ranks, fields, micro_batches, recompute, options = CASES[name]
    layout, device = Layout(**fields), torch.device("cuda", 0)
    documents = [[torch.zeros(length, dtype=torch.int64) for length in lengths] for lengths in micro_batches]
    torch.cuda.set_device(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with replaced([(schedule, "_reduce", counted)]), megatron(layout, seed=1) as groups:
        step = training_step(
            PROLONG_8B, layout, documents, groups, device, precision="bf16", recompute=recompute,
            offload=options.get("offload", False), split_threshold_tokens=4 * K,
        )  # fmt: skip
        for _ in range(2):  # the first allocates the optimizer's state and compiles what is compiled
            start = time.perf_counter()
            step()
            took = time.perf_counter() - start
    measured = {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "host_seconds": round(took, 3),
    }
    print(json.dumps(measured))


def planned_gib(name: str) -> float:
    """Of the fullest rank, without what the hardware table adds for CUDA and NCCL."""
    ranks, fields, micro_batches, recompute, options = CASES[name]
    layout, tokens = Layout(**fields), sum(micro_batches[0])
    job = Job(
        shape=PROLONG_8B,
        layout=layout,
        world_size=ranks,
        sequence_length=tokens,
        batch_sequences=ranks // layout.model_ranks * len(micro_batches),
        recompute=recompute,
        offload=options.get("offload", False),
    )
    return round(peak_memory(job).total / GIB, 2)


def main(only: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        null_cuda.build(Path(directory))
        for name in (name for name in CASES if only in name):
            gib = 80.0 if name.endswith("80 GiB") else 400.0  # elsewhere room to see how much it would be
            done = subprocess.run(
                [sys.executable, __file__, "--case", name],
                env=null_cuda.environment(Path(directory), gib=gib),
                capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            row = {"case": name, **json.loads(done.stdout.splitlines()[-1]), "planned_gib": planned_gib(name)}
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
    parser.add_argument("--case", help="play one case in this process")
    parser.add_argument("--only", default="", help="cases with this in their name; writes nothing")
    arguments = parser.parse_args()
    rehearse(arguments.case) if arguments.case else main(arguments.only)
