"""Run a command on a machine without a GPU as if it had H100s whose kernels do nothing.

    python tools/null_cuda/run.py --compute -- prolong train recipe.yaml precision=bf16
    python tools/null_cuda/run.py --compute --devices 4 -- pytest -m gpu

What it shows: whether the GPU path of a program runs through (devices that do not meet, hooks that do not fire,
arguments that no kernel takes) and what memory it takes. What it cannot show: any time; nor any number, unless
`--compute` has PyTorch's CPU kernels do the work on what the program takes for GPUs, and NCCL's messages travel.
Then it shows what the program computes where its GPU path differs from the CPU's, but for the kernels themselves.
(Without it a training ends after five steps: a batch whose targets sum to zero is skipped.)

Needs Linux, g++ and a CUDA 13 build of PyTorch in this Python environment, with the headers of its runtime:

    python3.11 -m venv .venv-cuda
    .venv-cuda/bin/pip install torch==2.13.0 "nvidia-cuda-crt==13.0.*" -e .      # torch from PyPI: CUDA wheels

Transformer Engine's layers run where it is installed too (2.12, 2.13 or 2.20; docs/rehearsal.md says how), but
for its kernels: under `--compute` te_kernels.cpp does their work, otherwise only its attention, which cuDNN would
build, is replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
# Libraries whose functions become stubs, and the few functions of them that work without a device.
_STUBBED = re.compile(r"cuda[A-Z]|__cuda(GetK|Init|Launch|PopCall|PushCall)\w+|cublas|cudnn|nccl")
_TORCH_LIBRARIES = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python")
_COMPILER = ["g++", "-std=c++17", "-O1", "-fPIC", "-w"]
_REAL = re.compile(r"\w*(GetErrorString|GetErrorName|GetVersion)$")


def build(target: Path) -> None:
    """Compile libcuda.so.1 and, to be preloaded, libcudart.so, libte.so and libte_kernels.so into `target`."""
    torch = _package("torch")
    headers = [_package("nvidia") / part / "include" for part in ("cu13", "nccl")]
    if not (headers[0] / "crt" / "host_defines.h").is_file():
        sys.exit(f'null_cuda: no CUDA headers in {headers[0]}: pip install "nvidia-cuda-crt==13.0.*"')
    libraries = [torch / "lib" / f"lib{name}.so" for name in _TORCH_LIBRARIES]
    if find_spec("transformer_engine") is not None:
        libraries += _engine(target, headers[0])
    wanted: set[str] = set()
    for library in libraries:
        wanted |= _symbols(library, "--dynamic", "--undefined-only")
    _library(
        target / "libcudart.so",
        [HERE / "libcudart.cpp", HERE / "nccl.cpp"],
        {name for name in wanted if _STUBBED.match(name) and not _REAL.match(name)},
        headers,
    )
    driver = set(re.findall(r"\b(cu[A-Z]\w*)\(", (headers[0] / "cuda.h").read_text()))
    driver |= {f"{name}_v{version}" for name in driver for version in (2, 3, 4)}
    _library(target / "libcuda.so.1", [HERE / "libcuda.c"], driver, headers)


def _engine(target: Path, headers: Path) -> list[Path]:
    """Compile what takes the place of Transformer Engine's kernels; returns its libraries."""
    engine = _package("transformer_engine")
    includes = [f"-I{headers}", f"-I{engine / 'common' / 'include'}"]
    fast = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    lazy = "-Wl,-z,lazy"  # they call functions of libraries that come later
    for source, library in (("transformer_engine.cpp", "libte.so"), ("te_kernels.cpp", "libte_kernels.so")):
        _run(*_COMPILER, *fast, *includes, "-shared", lazy, HERE / source, "-o", target / library)
    return [*engine.rglob("libtransformer_engine.so"), *engine.parent.rglob("transformer_engine_torch*.so")]


def _library(target: Path, sources: list[Path], wanted: set[str], headers: list[Path]) -> None:
    """The sources and a successful stub for every wanted function that they do not define."""
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    stubs = target.with_suffix(".stubs.c")
    for source, compiled in zip(sources, objects, strict=True):
        compiler = _COMPILER if source.suffix == ".cpp" else ["gcc", *_COMPILER[2:]]
        _run(*compiler, *(f"-I{path}" for path in headers), "-c", source, "-o", compiled)
    missing = sorted(wanted.difference(*(_symbols(compiled, "--defined-only") for compiled in objects)))
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    _run("gcc", "-fPIC", "-w", "-fno-builtin", "-c", stubs, "-o", stubs.with_suffix(".o"))
    linked = [*objects, stubs.with_suffix(".o"), "-o", target]
    _run("g++", "-shared", f"-Wl,-soname,{target.name}", *linked)


def _symbols(library: Path, *options: str) -> set[str]:
    listed = subprocess.run(["nm", *options, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line}


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def _package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"null_cuda: no package {name!r} in this environment; see {HERE / 'run.py'}")
    return Path(next(iter(found.submodule_search_locations)))


def environment(
    libraries: Path,
    devices: int = 1,
    gib: float = 80.0,
    compute: bool = False,
    capability: int = 9,
    flash3: bool = False,
) -> dict[str, str]:
    """The variables under which a process sees `devices` GPUs of `gib` GiB and that compute capability each."""
    preloaded = [*(["libte_kernels.so"] if compute else []), "libte.so", "libcudart.so"]
    return {
        **os.environ,
        **(_computing(libraries, flash3) if compute else {}),
        "LD_PRELOAD": " ".join(str(libraries / name) for name in preloaded if (libraries / name).exists()),
        "NVTE_DISABLE_NVRTC": "1",  # kernels that Transformer Engine would compile for the device it finds
        "LD_LIBRARY_PATH": str(libraries),
        "NULL_CUDA_DEVICES": str(devices),
        "NULL_CUDA_GIB": str(gib),
        "NULL_CUDA_CAPABILITY": str(capability),
        # Segments that grow ask the driver for virtual memory.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    }


def _computing(libraries: Path, flash3: bool) -> dict[str, str]:
    """The variables under which every Python process computes, with kernels.py and, if asked, FlashAttention-3."""
    (libraries / "sitecustomize.py").write_text(
        f"import sys; sys.path.append({str(HERE)!r}); import kernels\n"
    )
    messages = libraries / "messages"
    messages.mkdir()
    path = [libraries, *([HERE / "flash3"] if flash3 else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "NULL_CUDA_MESSAGES": str(messages),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TORCHDYNAMO_DISABLE": "1",  # kernels that Triton compiles for the device
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1, help="GPUs of this machine")
    parser.add_argument("--gib", type=float, default=80.0, help="memory of each GPU")
    parser.add_argument("--capability", type=int, choices=(8, 9, 10), default=9, help="8: A100, 10: B200")
    parser.add_argument("--compute", action="store_true", help="with numbers, by PyTorch's CPU kernels")
    parser.add_argument(
        "--flash3", action="store_true", help="with --compute: FlashAttention-3 is installed too"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: python tools/null_cuda/run.py -- COMMAND")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        libraries = Path(directory)
        build(libraries)
        machine = environment(
            libraries,
            arguments.devices,
            arguments.gib,
            arguments.compute,
            arguments.capability,
            arguments.flash3,
        )
        sys.exit(subprocess.call(command, env=machine))


if __name__ == "__main__":
    main()
