"""An 8B-shaped bf16 checkpoint of random numbers through the converter, beside `cp` of the same bytes.

    python benchmarks/convert/convert.py [--directory /scratch] [--layers 32]     # writes result.json

Needs twice the checkpoint's size on disk (32 GB at 32 layers) and removes everything it made. Each
measurement starts with the files of its input dropped from the page cache and ends when its output is on the disk
(the converter syncs; `cp` is followed by `sync -f`). `cp` runs before and after each conversion, because disks
change their mind; the ratio is against the mean of the two. Memory is the peak of RssAnon, sampled 50 times a
second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import write_result
from shapes import LLAMA3_8B

from megatron_prolong.convert.hf_writer import write_safetensors
from megatron_prolong.convert.names import Rows, hf_tensors
from megatron_prolong.convert.sidecar import exported_config, write_config


class RandomBits:
    """Normal bf16 numbers, the same few MB again and again: the disk does not look at them."""

    def __init__(self) -> None:
        self._numbers = torch.randn(32 * 2**20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def dtype(self, rows: Rows) -> torch.dtype:
        """Always bf16."""
        return torch.bfloat16

    def read_into(self, rows: Rows, out: Tensor) -> None:
        """Fill `out`."""
        out.view(-1).copy_(self._numbers[: out.numel()])


def drop_from_cache(directory: Path) -> None:
    """Ask the kernel to forget the directory's clean pages."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """`cp -r`, and `sync -f` of the target's file system."""
    drop_from_cache(source)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    elapsed = time.monotonic() - start
    drop_from_cache(target)
    shutil.rmtree(target)
    return elapsed


def convert(direction: str, source: Path, target: Path) -> dict[str, float]:
    """Run the command; seconds from its start to its end, and its peak of anonymous memory."""
    drop_from_cache(source)
    peak = 0
    start = time.monotonic()
    command = [sys.executable, "-m", "megatron_prolong", "convert", direction, str(source), str(target)]
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    elapsed = time.monotonic() - start
    drop_from_cache(target)
    return {"seconds": elapsed, "peak_anonymous_mib": peak / 2**20}


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Make, convert there and back, compare with cp, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a timeout removes the files too
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        shape = LLAMA3_8B.replace(num_layers=options.layers)
        (root / "hf").mkdir()
        write_config(root / "hf", exported_config(shape, None, "bfloat16"))
        tensors = hf_tensors(shape)
        write_safetensors(root / "hf", [(tensor, torch.bfloat16) for tensor in tensors], RandomBits())
        num_bytes = 2 * sum(tensor.numel for tensor in tensors)
        results: dict[str, Any] = {
            "layers": options.layers,
            "gigabytes": num_bytes / 1e9,
        }
        copies = [copy_seconds(root / "hf", root / "copy")]
        for direction, source, target in (("to-megatron", "hf", "megatron"), ("to-hf", "megatron", "again")):
            measured = convert(direction, root / source, root / target)
            shutil.rmtree(root / source)
            copies.append(copy_seconds(root / target, root / "copy"))
            pair = copies[-2:]
            results[direction] = {
                **{key: round(value, 1) for key, value in measured.items()},
                "gb_per_second": round(num_bytes / 1e9 / measured["seconds"], 2),
                "cp_seconds": [round(value, 1) for value in pair],
                "times_cp": round(measured["seconds"] / (sum(pair) / 2), 2),
            }
            print(direction, json.dumps(results[direction]), flush=True)
    write_result(options.output, results)


if __name__ == "__main__":
    main()
