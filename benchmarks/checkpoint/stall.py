"""What saving costs a run: `prolong train` with checkpoints in the background, in the foreground, and without any.

    python benchmarks/checkpoint/stall.py [--directory /scratch] [--processes 1]      # writes result.json

A Llama of 64 M parameters on CPU, 1 GB of weights and optimizer per checkpoint, saved every 8 of 26 steps. The
runs take turns. Stall is the time training stood still for a save (copying to memory, completing), as the
run's own metrics.jsonl has it; bandwidth is the checkpoint's bytes over the time from the snapshot to its name,
checksums and fsync included. Beside it: the same bytes written and synced with dd, and Megatron's own
dist_checkpointing.save of the same state (three times in one process: the first one starts another process).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import write_result

RECIPE = """\
name: stall
run_dir: {root}/run
model:
  init: {{num_layers: 8, hidden_size: 512, num_heads: 8, num_kv_heads: 2, ffn_hidden_size: 2048}}
  tokenizer: {root}/tokenizer
precision: fp32
recompute: none
checkpoint: {{every: 8, keep: 1}}
stages:
  - {{name: only, sequence_length: 256, batch_tokens: 256, steps: 26, lr: 1e-4, mixture: mock}}
"""
WAYS = {
    "background": ["checkpoint.async_save=true"],
    "foreground": ["checkpoint.async_save=false"],
    "none": ["checkpoint.every=1000"],
}
WARM_UP_STEPS = 5


def run(root: Path, way: str, processes: int) -> dict[str, Any]:
    """One run; what its metrics say about steps and saves (the last save ends the run and is left out)."""
    subprocess.run(["rm", "-rf", root / "run"], check=True)
    command = [sys.executable, "-m", "megatron_prolong", "train", str(root / "recipe.yaml"), *WAYS[way]]
    command += ["--processes", str(processes)] if processes > 1 else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    saves = [record for record in records if record.get("event") == "checkpoint"][:-1]
    between = [later["time"] - former["time"] for former, later in itertools.pairwise(steps)]
    return {
        "step_seconds": statistics.median(between[WARM_UP_STEPS:]),
        "steps_seconds": sum(between[WARM_UP_STEPS:-1]),
        "stall_seconds": [round(save["stall_seconds"], 3) for save in saves],
        "save_seconds": [round(save["seconds"], 3) for save in saves],
        "bytes": saves[0]["bytes"] if saves else 0,
    }


def dd_seconds(root: Path, num_bytes: int) -> float:
    """A file of so many bytes, synced."""
    command = f"dd if=/dev/zero of={root}/dd bs=4M count={num_bytes // (4 << 20)} conv=fsync 2>&1"
    said = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    (root / "dd").unlink()
    return float(said.split(",")[-2].split()[0])


MEGATRON = """
import json, sys, time, warnings
from pathlib import Path
import torch
from megatron.core import dist_checkpointing
from megatron_prolong.mcore.build import build_model
from megatron_prolong.mcore.checkpoint import load_weights_and_optimizer
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.mcore.optimizer import build_optimizer
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime.launch import distributed
checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
shape = ModelShape.from_dict(json.loads((checkpoint / "prolong.json").read_text())["shape"])
metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
warnings.simplefilter("ignore")
with distributed(), megatron(Layout(), 1):
    model = build_model(shape, Layout(), precision="fp32")
    optimizer = build_optimizer(model, OptimizerSpec(), Layout(), lr=0.0)
    load_weights_and_optimizer(checkpoint, model, optimizer)
    seconds = []
    for number in range(3):
        (out / str(number)).mkdir(parents=True)
        start = time.perf_counter()
        (chunk,) = model.bare_chunks
        state = {"model": chunk.sharded_state_dict(metadata=dict(metadata))}
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=dict(metadata))
        dist_checkpointing.save(state, str(out / str(number)))
        seconds.append(round(time.perf_counter() - start, 3))
print(json.dumps(seconds))
"""


def megatron_seconds(root: Path) -> list[float]:
    """Megatron's synchronous save, three times."""
    (checkpoint,) = (root / "run/only").glob("step_*")
    command = [sys.executable, "-c", MEGATRON, checkpoint, root / "megatron"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    subprocess.run(["rm", "-rf", root / "megatron"], check=True)
    return json.loads(said.splitlines()[-1])


def write_inputs(root: Path) -> None:
    """Recipe and tokenizer."""
    (root / "tokenizer").mkdir()
    words = {f"t{number}": number for number in range(32_000)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(root / "tokenizer/tokenizer.json"))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))


def summary(saving: list[dict[str, Any]], without: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one way of saving, against those that never save."""
    stalls = [stall for turn in saving for stall in turn["stall_seconds"]]
    saves = [save for turn in saving for save in turn["save_seconds"]]
    step = min(turn["step_seconds"] for turn in without)
    fastest, fastest_without = (min(turn["steps_seconds"] for turn in turns) for turns in (saving, without))
    return {
        "stall_seconds": stalls,
        "save_seconds": saves,
        "gb_per_second": round(saving[0]["bytes"] / 1e9 / statistics.median(saves), 3),
        "stall_percent_of_a_step": round(100 * statistics.median(stalls) / step, 1),
        "stall_percent_at_every_125": round(100 * statistics.median(stalls) / (125 * step), 2),
        "run_slower_than_without_percent": round(100 * (fastest / fastest_without - 1), 1),
    }


def main() -> None:
    """Take turns; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        write_inputs(root)
        turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.turns):
            for way in WAYS:
                turns[way].append(run(root, way, options.processes))
                print(way, json.dumps(turns[way][-1]), flush=True)
        num_bytes = turns["background"][0]["bytes"]
        result: dict[str, Any] = {"processes": options.processes, "bytes": num_bytes}
        result["step_seconds"] = round(min(turn["step_seconds"] for turn in turns["none"]), 3)
        for way in ("background", "foreground"):
            result[way] = summary(turns[way], turns["none"])
        result["dd_gb_per_second"] = round(num_bytes / 1e9 / dd_seconds(root, num_bytes), 3)
        if options.processes == 1:
            result["megatron_save_seconds"] = megatron_seconds(root)
    write_result(options.output, result)


if __name__ == "__main__":
    main()
