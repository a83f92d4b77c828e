"""Kill runs with SIGKILL at random moments until it has been done often enough: `kill_runs.py RECIPE KILLS SEED`.

The recipe's run (RECIPE-0, RECIPE-1, …) starts again after every kill until it reaches its end, then the next one
begins. After every kill `latest` must name a complete checkpoint, no older than before. Prints one line of JSON.
Each life is a fork of this process, which has imported everything, so that starting costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import megatron_prolong.cli.train
import megatron_prolong.evaluation.in_training
import megatron_prolong.mcore.checkpoint
import megatron_prolong.training.run  # noqa: F401
from megatron_prolong.cli.main import run
from megatron_prolong.runtime.checksums import verify_checksums
from megatron_prolong.training.run_directory import latest_checkpoint


def start(recipe: Path, run_dir: Path) -> int:
    """Fork a life of the run; returns its process id."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(f"{run_dir}.log", "a", buffering=1)  # noqa: SIM115, PTH123
        sys.argv = ["prolong", "train", str(recipe), f"run_dir={run_dir}"]
        try:
            run()
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
        os._exit(int(code))
    return pid


def newest_steps(run_dir: Path) -> list[int]:
    """Step of the newest checkpoint by stage, every byte of it checked."""
    steps = []
    for stage in ("short", "long"):
        found = latest_checkpoint(run_dir / stage)
        if found is not None:
            verify_checksums(found.directory)
        steps.append(found.step if found else 0)
    return steps


def live(pid: int, seconds: float) -> int:
    """Wait until the process ends or for so long, then kill it; returns the wait status."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.002)


def main() -> None:
    """Kill, check, go on."""
    recipe, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    killed, during_a_save, finished = 0, 0, []
    steps, longest = [0, 0], 3.0
    while killed < kills or not finished:
        run_dir = recipe.with_name(f"{recipe.stem}-{len(finished)}")
        status = live(start(recipe, run_dir), chance.uniform(0, longest) if killed < kills else 600)
        before, steps = steps, newest_steps(run_dir)
        assert steps >= before, (before, steps)
        if os.WIFSIGNALED(status):
            killed += 1
            during_a_save += bool(list(run_dir.glob("*/*.partial")))
            # So that a life is a few steps long, whatever the machine is doing.
            longest *= 1.2 if steps == before else 0.9
        else:
            assert status == 0, Path(f"{run_dir}.log").read_text()[-3000:]
            finished.append(str(run_dir))
            steps, longest = [0, 0], 0.7 * longest
    print(json.dumps({"kills": killed, "during_a_save": during_a_save, "finished": finished}))


main()
