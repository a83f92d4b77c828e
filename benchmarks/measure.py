"""What every benchmark needs: one measurement per fresh process, the machine described, results as JSON.

A fresh process gives an honest peak of memory (the kernel's high-water mark cannot be reset) and survives
a measurement that runs out of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def machine() -> dict[str, Any]:
    """Processor, cores, memory and software of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    processor = next(
        (value.strip() for key, value in fields.items() if key.strip() == "model name"), "unknown"
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 1),  # of other work too: above `cores`, times are inflated
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_fresh_process(
    script: str,
    arguments: dict[str, Any],
    timeout_seconds: float = 600,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `script --case '<json>'` and returns the JSON it prints last, or why it did not get there."""
    command = [sys.executable, script, "--case", json.dumps(arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {timeout_seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        return {"failed": reason[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(
    description: str | None,
    measure_case: Callable[[dict[str, Any]], dict[str, Any]],
    main: Callable[[], None],
) -> None:
    """The command line of a script that measures in fresh processes: all of it, or the one case of a child."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=json.loads, help="one measurement, as JSON")
    arguments = parser.parse_args()
    print(json.dumps(measure_case(arguments.case))) if arguments.case else main()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Shortest wall time after one warm-up: other work on the machine only ever adds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class PeakMemory:
    """Resident memory that a block of code adds at its highest, in bytes; sampled every two milliseconds."""

    def __enter__(self) -> PeakMemory:
        self._before = self._highest = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, _resident_bytes())

    @property
    def added_bytes(self) -> int:
        return self._highest - self._before


def limit_memory(num_bytes: int) -> None:
    """Lets this process fail instead of pushing the machine into swap or its other processes out."""
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """JSON beside the script, with the machine it was measured on."""
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"wrote {path}")


def write_row(path: Path, what: str, row: dict[str, Any], keys: Sequence[str]) -> None:
    """Add a row to a result, in place of the one with the same keys; rows of another machine or PyTorch go."""
    rows, here = [], machine()
    if path.exists():
        before = json.loads(path.read_text())
        if all(before["machine"][name] == here[name] for name in ("accelerator", "torch")):
            rows = [old for old in before["rows"] if any(old[key] != row[key] for key in keys)]
    write_result(path, {"what": what, "rows": [*rows, row]})
