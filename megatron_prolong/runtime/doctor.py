"""What this machine has: packages, devices, fabric, disk, and how fast its processes talk to each other.

Nothing here judges a recipe (cli/doctor.py does); a finding says what is there, how good that is, and what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.requirements import Requirement

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.cores import usable_cores
from megatron_prolong.runtime.flash_attention_3 import (
    INSTALL,
    is_flash_attention_3_installed,
    use_flash_attention_3,
)
from megatron_prolong.runtime.packages import version_of
from megatron_prolong.runtime.stopwatch import Stopwatch

Status = Literal["ok", "warning", "missing"]

# Distribution name -> what is lost without it.
OPTIONAL_PACKAGES = {
    "transformer-engine": "fp8 and Transformer Engine's attention",
    "apex": "Apex's fused optimizer (Transformer Engine's serves as well)",
    "wandb": "tracking with Weights & Biases",
    "lm-eval": "short-context evaluation",
}
# cuDNN's own number for 9.18: before it, attention's backward on Hopper reads an uninitialised workspace, and
# gradients of packed documents can be NaN (Transformer Engine issue 2186).
HOPPER_CUDNN = 91800
ALL_REDUCE_BYTES = 64 * 2**20
SLOW_GPU = 0.9  # of the fastest beside it


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Attributes:
        name: what was looked at.
        status: "missing" stops every run; "warning" stops or slows some.
        detail: what was found.
        remedy: what to do; empty when nothing needs doing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(directory: Path, *, quick: bool) -> list[Finding]:
    """Everything there is to say about this machine.

    Args:
        directory: where runs would write, or the nearest one above it; its file system is looked at.
        quick: skip what runs on the GPUs, whose memory a training may have filled, and the all-reduce.
    """
    looks: list[Callable[[], list[Finding]]] = [
        _system, _packages, _devices, _cudnn, _backends, _fabric, lambda: _disk(directory),
    ]  # fmt: skip
    if not quick:
        looks += [_attention, _gpu_speeds, _all_reduce]
    return [finding for look in looks for finding in look()]


def _system() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return [
        Finding("system", "ok", f"{detail}, {usable_cores()} CPUs, {memory / 2**30:.0f} GiB of memory"),
        _shared_memory(),
    ]


def _shared_memory() -> Finding:
    """NCCL and data workers talk through /dev/shm; containers get 64 MB of it by default."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "mount a tmpfs there")
    total = shutil.disk_usage(shm).total
    if total < 2**30:
        remedy = "give the container more: --shm-size=16g or --ipc=host"
        return Finding("shared memory", "warning", f"/dev/shm has {total / 2**20:.0f} MiB", remedy)
    return Finding("shared memory", "ok", f"/dev/shm has {total / 2**30:.0f} GiB")


def _packages() -> list[Finding]:
    """What setup.py requires, and what is optional."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("megatron-prolong") or []]
    by_name = {requirement.name: requirement for requirement in wanted}
    needed = [_package(requirement, None) for requirement in wanted if requirement.marker is None]
    optional = OPTIONAL_PACKAGES.items()
    return [*needed, *(_package(by_name.get(name, Requirement(name)), lost) for name, lost in optional)]


def _package(wanted: Requirement, lost: str | None) -> Finding:
    """`lost`: what is lost without an optional package; None for a required one."""
    version, remedy = version_of(wanted.name), f'pip install "{wanted.name}{wanted.specifier}"'
    if version is None:
        if lost is not None:
            return Finding(wanted.name, "ok", f"not installed: no {lost}")
        return Finding(wanted.name, "missing", "not installed", remedy)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "warning", f"{version}; tested with {wanted.specifier}", remedy)
    return Finding(wanted.name, "ok", version)


def _devices() -> list[Finding]:
    if not torch.cuda.is_available():
        reason = "PyTorch built without CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        detail = f"none ({reason}): everything runs on CPU with gloo, for tests and small models"
        return [Finding("GPUs", "ok", detail)]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        detail = f"{device.name}, {device.total_memory / 1e9:.1f} GB, {capability}"
        remedy = "training on GPUs is in bf16, which needs 8.0" if device.major < 8 else ""
        findings.append(Finding(f"GPU {index}", "warning" if remedy else "ok", detail, remedy))
    return [*findings, _compiler()]


def _gpu_speeds() -> list[Finding]:
    """A GPU that is hot, capped or damaged keeps all others of a job waiting."""
    if not torch.cuda.is_available():
        return []
    speeds = measure_gpus()
    detail = ", ".join(f"{speed:.0f}" for speed in speeds) + " TFLOP/s (bf16, all at once)"
    slow = [f"GPU {index}" for index, speed in enumerate(speeds) if speed < SLOW_GPU * max(speeds)]
    if not slow:
        return [Finding("matrix products", "ok", detail)]
    remedy = f"look at clocks, temperature and errors of {', '.join(slow)}: nvidia-smi -q"
    return [Finding("matrix products", "warning", detail, remedy)]


def measure_gpus(width: int = 8192, products: int = 100) -> list[float]:
    """TFLOP/s of every GPU in products of square matrices of `width`, while all of them are at work."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    factors = [torch.randn(width, width, dtype=torch.bfloat16, device=device) for device in devices]
    watches = [Stopwatch(device) for device in devices]
    for _ in range(2):  # the first round warms up
        for watch in watches:
            watch.start()
        for _ in range(products):
            for factor in factors:
                torch.mm(factor, factor)
        for watch in watches:
            watch.stop()
    return [products * 2 * width**3 / watch.seconds() / 1e12 for watch in watches]


def _compiler() -> Finding:
    """Triton builds a stub for every kernel at its first use (triton/runtime/build.py)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and headers.exists():
        return Finding("C compiler", "ok", compiler)
    lacking = "no gcc or clang" if not compiler else f"no {headers}"
    remedy = "install gcc and Python's headers (python3-dev) on the compute nodes"
    return Finding("C compiler", "missing", f"{lacking}, which the loss's kernels are built with", remedy)


def _cudnn() -> list[Finding]:
    """Its kernels compute the attention of Transformer Engine."""
    if not torch.cuda.is_available():
        return []
    try:
        version = torch.backends.cudnn.version() or 0
    except RuntimeError as error:  # not the version that PyTorch was built with
        return [Finding("cuDNN", "warning", str(error), "take other copies out of LD_LIBRARY_PATH")]
    detail = f"{version // 10_000}.{version // 100 % 100}"
    on_hopper = any(torch.cuda.get_device_capability(i)[0] == 9 for i in range(torch.cuda.device_count()))
    if on_hopper and version < HOPPER_CUDNN:
        detail += ": gradients of packed documents can be NaN on Hopper"
        return [Finding("cuDNN", "warning", detail, "install cuDNN 9.18 or later")]
    return [Finding("cuDNN", "ok", detail)]


def _attention() -> list[Finding]:
    """What attends on Hopper and Blackwell, where PyTorch's own kernel is far slower than the best."""
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if generation not in (9, 10):
        return []
    if generation == 9 and is_flash_attention_3_installed():
        try:
            use_flash_attention_3()
        except UserError as error:
            return [Finding("attention", "missing", str(error))]  # it says what to do
        return [Finding("attention", "ok", "FlashAttention-3 where PyTorch attends")]
    if version_of("transformer-engine") is not None:
        return [Finding("attention", "ok", "Transformer Engine's")]
    detail = "PyTorch's FlashAttention-2, with half the speed of the best kernels or less"
    remedy = "use Transformer Engine" if generation == 10 else f"{INSTALL}, or use Transformer Engine"
    return [Finding("attention", "warning", detail, remedy)]


def _backends() -> list[Finding]:
    if not dist.is_available():
        remedy = "install a PyTorch with distributed support"
        return [Finding("torch.distributed", "missing", "not built in", remedy)]
    gloo = Finding("gloo", "ok" if dist.is_gloo_available() else "missing", "built into PyTorch")
    if not torch.cuda.is_available():
        return [gloo]
    if not dist.is_nccl_available():
        return [gloo, Finding("NCCL", "missing", "not in this PyTorch", "install a CUDA build of PyTorch")]
    return [gloo, Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))]


def _fabric() -> list[Finding]:
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    network = ", ".join(adapters) if adapters else "no InfiniBand or RoCE adapter: nodes would talk over TCP"
    findings = [Finding("network", "ok", network)]
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        links = _output(["nvidia-smi", "nvlink", "--status"]).count("GB/s")
        detail = f"{links} active NVLink links" if links else "no NVLink seen: GPUs talk over PCIe"
        remedy = "" if links else "keep tp at 1"
        findings.append(Finding("NVLink", "ok" if links else "warning", detail, remedy))
    return findings


def _disk(directory: Path) -> list[Finding]:
    free = shutil.disk_usage(directory).free
    try:
        speed = _write_speed(directory)
    except OSError as error:
        remedy = "choose a run_dir that can be written"
        return [Finding("disk", "missing", f"cannot write under {directory}: {error.strerror}", remedy)]
    return [Finding("disk", "ok", f"{free / 1e9:.0f} GB free at {directory}, writes {speed / 1e6:.0f} MB/s")]


def _write_speed(directory: Path) -> float:
    """Bytes per second of one synced file of 32 MiB."""
    data, count = os.urandom(2**20), 32
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".prolong-doctor-") as file:
        start = time.perf_counter()
        for _ in range(count):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return count * len(data) / (time.perf_counter() - start)


def _all_reduce() -> list[Finding]:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > 1
    size = torch.cuda.device_count() if on_gpu else 2
    backend = "nccl" if on_gpu else "gloo"
    name = f"all-reduce ({backend}, {size} processes)"
    try:
        seconds = measure_all_reduce(backend, size)
    except Exception as error:  # whatever breaks here is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "check NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME and firewalls between processes"
        return [Finding(name, "missing", f"failed: {lines[-1]}", remedy)]
    bandwidth = 2 * (size - 1) / size * ALL_REDUCE_BYTES / seconds
    detail = (
        f"{ALL_REDUCE_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms, {bandwidth / 1e9:.2f} GB/s bus bandwidth"
    )
    return [Finding(name, "ok", detail)]


def measure_all_reduce(backend: str, size: int, num_bytes: int = ALL_REDUCE_BYTES) -> float:
    """Median seconds of an all-reduce of fp32 over `size` new processes on this machine."""
    with tempfile.TemporaryDirectory(prefix="prolong-doctor-") as directory:
        store, result = f"{directory}/store", f"{directory}/seconds"
        mp.spawn(_all_reduce_worker, (backend, size, num_bytes, store, result), nprocs=size)
        return float(Path(result).read_text())


def _all_reduce_worker(rank: int, backend: str, size: int, num_bytes: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
        **options,
    )
    data = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if backend == "nccl":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    assert data[0].item() == float(size) ** 7, "the sum over the ranks is wrong"
    if rank == 0:
        Path(result).write_text(str(sorted(seconds[2:])[2]))
    dist.destroy_process_group()


def _output(command: list[str]) -> str:
    """What a command prints, or nothing when it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
