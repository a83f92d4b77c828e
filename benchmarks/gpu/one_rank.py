"""One rank of many on one GPU, with all layers of the 8B model: time and memory of its training step.

    python benchmarks/gpu/one_rank.py                # writes benchmarks/gpu/one_rank.json, row by row
    python benchmarks/gpu/one_rank.py --only "512K"  # only the cases with that in their name; other rows stay

What the other ranks send is what this one sends (echo_group.py): every kernel of the rank runs on data as it would,
but no message travels. The time is that of computation alone, so tokens per second are those of a network without
cost; the planner's prediction beside them leaves the same out. Peaks are PyTorch's: without CUDA's context and
NCCL's buffers, `reserved` with what fragmentation takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import echo_group
import measure
from throughput import PROLONG_8B, select_way, this_gpu, training_step

from megatron_prolong.mcore import schedule
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import BatchDocuments
from megatron_prolong.plan.memory import peak_memory
from megatron_prolong.plan.time import step_time
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime.gpu_environment import set_gpu_environment
from megatron_prolong.runtime.replace import replaced

WAYS = ("native", "te", "te fp8")
GIB = 2**30
K = 1024
BAG = [32 * K, 20 * K, 7 * K, 3 * K, 1 * K, 700, 324]  # a 64K pack of many documents


@dataclass(frozen=True)
class Case:
    """A rank of a run.

    Attributes:
        ranks: of the run.
        documents: lengths in tokens, of each micro-batch.
        gib: memory to do with, where it is not all there is.
    """

    ranks: int
    layout: Layout = field(default_factory=Layout)
    documents: tuple[list[int], ...] = ([64 * K],)
    recompute: str = "full"
    offload: bool = False
    gib: float | None = None

    def job(self, way: str) -> Job:
        """As the planner sees it."""
        return Job(
            shape=PROLONG_8B,
            layout=self.layout,
            world_size=self.ranks,
            sequence_length=sum(self.documents[0]),
            batch_sequences=self.ranks // self.layout.model_ranks * len(self.documents),
            precision="fp8" if way == "te fp8" else "bf16",
            recompute=self.recompute,
            offload=self.offload,
            transformer_engine=way != "native",
        )


P2P, A2A, HIERARCHICAL = (Layout(cp=8, cp_exchange=name) for name in ("p2p", "a2a", "a2a+p2p"))
LONG = ([512 * K],)
CASES = {
    "16K, nothing recomputed": Case(32, documents=([16 * K],), recompute="none"),
    "16K, selective": Case(32, documents=([16 * K],), recompute="selective"),
    "64K, one document": Case(32),
    "64K, packs of many documents": Case(32, documents=(BAG, [64 * K], BAG)),
    "64K, tp 2 cp 4": Case(32, Layout(tp=2, cp=4, cp_exchange="all_gather"), recompute="none"),
    "64K, tp 4 cp 2, a bag split and whole": Case(
        32, Layout(tp=4, cp=2, cp_exchange="p2p"), (BAG,), recompute="selective"
    ),
    "512K, cp 8 p2p": Case(8, P2P, LONG),
    "512K, cp 8 all_gather": Case(8, Layout(cp=8, cp_exchange="all_gather"), LONG),
    "512K, cp 8 a2a": Case(8, A2A, LONG),
    "512K, cp 8 a2a+p2p": Case(8, HIERARCHICAL, LONG),
    "512K, cp 8 a2a, offload, 80 GiB": Case(8, A2A, LONG, offload=True, gib=80),
    "512K, tp 4 cp 2 p2p": Case(64, Layout(tp=4, cp=2, cp_exchange="p2p"), LONG),
    "512K, cp 8 p2p, all but attention": Case(8, P2P, LONG, recompute="all_but_attention"),
    "512K, tp 2 cp 4 a2a, all but attention": Case(
        8, Layout(tp=2, cp=4, cp_exchange="a2a"), LONG, recompute="all_but_attention"
    ),
    "512K, tp 4 cp 2 p2p, all but attention, offload": Case(
        8, Layout(tp=4, cp=2, cp_exchange="p2p"), LONG, recompute="all_but_attention", offload=True
    ),
    "1M, tp 4 cp 8 p2p": Case(32, Layout(tp=4, cp=8, cp_exchange="p2p"), ([1024 * K],)),
}


def play(name: str, way: str, rehearsed: bool) -> dict[str, Any]:
    """Two steps of one rank; the second one's time, and the peak of both.

    Args:
        rehearsed: kernels do nothing, so they count no targets either, without which a step would be skipped.
    """
    case, device = CASES[name], torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    documents = [
        [torch.randint(PROLONG_8B.vocab_size, (length,), generator=generator) for length in lengths]
        for lengths in case.documents
    ]
    torch.cuda.set_device(device)
    if case.gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.gib * GIB / total))
    precision = select_way(way)
    os.environ["NVTE_BATCH_MHA_P2P_COMM"] = "1"  # TE's messages in pairs, which one process can answer
    echo_group.join(0, case.ranks)
    with ExitStack() as stack:
        if rehearsed:
            stack.enter_context(replaced([(schedule, "_reduce", lambda *_: (0.0, 1))]))
        groups = stack.enter_context(megatron(case.layout, seed=1))
        step = training_step(
            PROLONG_8B, case.layout, documents, groups, device, precision=precision, recompute=case.recompute,
            offload=case.offload, split_threshold_tokens=4 * K,
        )  # fmt: skip
        for _ in range(2):  # the first allocates the optimizer's state and compiles what is compiled
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return {
        "loss": round(loss, 4),
        "seconds": round(seconds, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def planned_gib(name: str, way: str = "native") -> float:
    """Of the fullest rank, without what the hardware table adds for CUDA and NCCL."""
    return round(peak_memory(CASES[name].job(way)).total / GIB, 2)


def planned_seconds(name: str, way: str, gpu: Gpu) -> float:
    """Of what is measured here: no messages, and nothing for what whole runs lose."""
    case = CASES[name]
    job = case.job(way)
    lengths = [np.array(micro_batch) for micro_batch in case.documents] * job.dp
    parts = step_time(job, gpu, [BatchDocuments.of(lengths)])
    return parts.matmul + parts.attention + parts.elementwise + parts.optimizer + parts.offload


def measure_row(name: str, way: str) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "way": way}
    row |= measure.in_fresh_process(__file__, {**row, "rehearsed": False})
    if "failed" in row:
        return row
    tokens = sum(map(sum, CASES[name].documents)) / CASES[name].layout.model_ranks
    row["tokens_per_second, without communication"] = round(tokens / row["seconds"])
    row["planned_over_measured_gib"] = round(planned_gib(name, way) / row["peak_gib"], 3)
    if (gpu := this_gpu()) is not None:
        planned = planned_seconds(name, way, gpu)
        row["planned_over_measured_seconds"] = round(planned / row["seconds"], 3)
    return row


def main(only: str) -> None:
    set_gpu_environment()  # for the processes that measure
    for name in CASES:
        for way in WAYS:
            if only not in f"{name}, {way}":
                continue
            row = measure_row(name, way)
            print(json.dumps(row), flush=True)
            what = "8B Llama, one rank's training step without its messages"
            measure.write_row(Path(__file__).with_suffix(".json"), what, row, ("case", "way"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=json.loads, help="one measurement, as JSON")
    parser.add_argument("--only", default="", help="the rows with this in 'CASE, WAY'")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(play(arguments.case["case"], arguments.case["way"], arguments.case["rehearsed"])))
    else:
        main(arguments.only)
