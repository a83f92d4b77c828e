"""The data engine beside its peers: tokenizing, packing, reading.

    PROLONG_STREAMING_PYTHON=python-with-datatools python benchmarks/data/data.py

Peers run in the interpreter named above, which needs mosaicml-streaming and datatools; without it they are
left out. Every measurement is one process with one thread; ours and the peer's take turns, and the shortest
of the repeats counts, so that other work on the machine weighs on both alike. cpu_seconds are user and
system time with the input in the page cache; cold_seconds are wall time with the input's pages dropped
first, where the disk decides. Writes data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__)
sys.path.insert(0, str(HERE.parents[1]))
PEER = os.environ.get("PROLONG_STREAMING_PYTHON", "")
DIRECTORIES = ("packs", "documents")
ORDERS = ("sequential", "random")


def timed(function: Callable[[], object]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return {
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
    }


# Cases: each runs in a fresh process and prints one JSON object. Those of peers import nothing of ours.


def case_tokenize(work: Path) -> dict[str, Any]:
    from megatron_prolong.data.tokenize import tokenize

    out = work / "source" if not (work / "source").exists() else work / f"t{os.getpid()}"
    return timed(lambda: tokenize([str(work / "corpus.jsonl")], work / "tok", out))


def case_encode(work: Path, method: str) -> dict[str, Any]:
    """The tokenizer alone, texts in memory, results thrown away: no reading, no writing, no long documents."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tok" / "tokenizer.json"))
    with (work / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = getattr(tokenizer, method)

    def run() -> None:
        for start in range(0, len(texts), 256):
            encode(texts[start : start + 256], add_special_tokens=False)

    return timed(run)


def case_pack(work: Path) -> dict[str, Any]:
    from megatron_prolong.data.pack import PackOptions, pack

    out = work / "packs" if not (work / "packs").exists() else work / f"p{os.getpid()}"
    return timed(lambda: pack([work / "documents"], out, PackOptions(65_536, "concat")))


def case_datatools(work: Path) -> dict[str, Any]:
    from functools import partial

    from datatools import LoadOptions, ProcessOptions, load, process
    from datatools.scripts.pack import PackOptions, pack_fn

    data = load(work / "documents", options=LoadOptions())
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "length": "int", "domain": "str"}
    work_on = partial(pack_fn, options=PackOptions(pack_length=65_536))
    out = work / f"p{os.getpid()}"
    return timed(lambda: process(data, work_on, out, ProcessOptions(columns=columns)))


def case_read(work: Path, directory: str, order: str, reader: str) -> dict[str, Any]:
    """Every sample once. `views`: as our reader hands them over. `copied`: tokens copied out of the map, so
    that every byte was read. streaming reads every byte into new memory."""
    import numpy as np

    if reader == "streaming":
        from streaming import LocalDataset as Reader
    else:
        from megatron_prolong.data.mds import MDSReader as Reader
    path = work / directory
    data = Reader(str(path))
    numbers = np.arange(len(data))
    if order == "random":
        numbers = np.random.default_rng(0).permutation(numbers)

    def run() -> None:
        for number in numbers.tolist():
            tokens = data[number]["input_ids"]
            if reader == "copied":
                np.array(tokens)

    warm = timed(run)
    del data  # and with it the maps, which would keep pages
    drop_pages(path)
    data = Reader(str(path))
    return warm | {"cold_seconds": timed(run)["wall_seconds"]}


def case_raw(work: Path, directory: str) -> dict[str, Any]:
    """The bytes of the shards read front to back, 1 MiB at a time: the disk's own speed."""
    buffer = bytearray(1 << 20)

    def run() -> None:
        for path in sorted((work / directory).rglob("*.mds")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    run()
    warm = timed(run)
    drop_pages(work / directory)
    return warm | {"cold_seconds": timed(run)["wall_seconds"]}


def drop_pages(directory: Path) -> None:
    """Ask the kernel to forget the files; what is mapped or not yet written stays."""
    os.sync()
    for path in directory.rglob("*.mds"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(python: str, case: str, work: Path, **arguments: str) -> dict[str, Any]:
    if not python:
        return {"left_out": "PROLONG_STREAMING_PYTHON is not set"}
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE), "--case", case, "--work", str(work), "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for path in [*work.glob("p[0-9]*"), *work.glob("t[0-9]*")]:
        shutil.rmtree(path)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(case, arguments, result, file=sys.stderr, flush=True)
    return result


def in_turn(repeats: int, cases: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each case `repeats` times, taking turns; the smallest of every number."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for name, case in cases.items():
            found, best = case(), results.get(name, {})
            results[name] = {
                key: min(value, best.get(key, value)) if isinstance(value, float) else value
                for key, value in found.items()
            }
    return results


def times_faster(ours: dict[str, Any], peer: dict[str, Any], what: str = "cpu_seconds") -> float | None:
    return round(peer[what] / max(ours[what], 1e-3), 2) if what in peer and what in ours else None


def main(megabytes: int, num_tokens: int, repeats: int) -> None:
    """Runs everything; data.json holds what is finished so far."""
    from corpus import write_jsonl, write_repeated, write_tokenizer
    from measure import machine

    from megatron_prolong.data.mds import MDSReader

    me = sys.executable
    results: dict[str, Any] = {"machine": machine(), "repeats": repeats}

    def save() -> None:
        (HERE.parent / "data.json").write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_tokenizer(work / "tok")
        num_bytes = write_jsonl(work / "corpus.jsonl", megabytes << 20)
        cases = {
            "ours": lambda: fresh(me, "tokenize", work),
            "encode_batch": lambda: fresh(me, "encode", work, method="encode_batch"),
            "encode_batch_fast": lambda: fresh(me, "encode", work, method="encode_batch_fast"),
        }
        found = in_turn(repeats, cases)
        for peer in ("encode_batch", "encode_batch_fast"):
            found[peer]["ours_is_times_faster"] = times_faster(found["ours"], found[peer])
        results["tokenize"] = {"text_bytes": num_bytes, **found}
        save()

        write_repeated(work / "source", work / "documents", num_tokens)
        cases = {"ours": lambda: fresh(me, "pack", work), "datatools": lambda: fresh(PEER, "datatools", work)}
        found = in_turn(repeats, cases)
        found["datatools"]["ours_is_times_faster"] = times_faster(found["ours"], found["datatools"])
        num_documents = len(MDSReader(work / "documents"))
        results["pack"] = {"tokens": num_tokens, "documents": num_documents, **found}
        save()

        for directory in DIRECTORIES:
            for order in ORDERS:
                results[f"read {directory}, {order}"] = _compare_reading(work, directory, order, repeats)
                save()


def _compare_reading(work: Path, directory: str, order: str, repeats: int) -> dict[str, Any]:
    def read(python: str, reader: str) -> Callable[[], dict[str, Any]]:
        return lambda: fresh(python, "read", work, directory=directory, order=order, reader=reader)

    cases = {name: read(sys.executable, name) for name in ("views", "copied")}
    cases |= {
        "streaming": read(PEER, "streaming"),
        "disk": lambda: fresh(sys.executable, "raw", work, directory=directory),
    }
    found = in_turn(repeats, cases)
    for name in ("views", "copied"):
        found["streaming"][f"{name}_is_times_faster"] = times_faster(found[name], found["streaming"])
    found["disk"]["ours_of_the_disks_speed"] = times_faster(found["copied"], found["disk"], "cold_seconds")
    found["disk"]["streaming_of_the_disks_speed"] = times_faster(
        found["streaming"], found["disk"], "cold_seconds"
    )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=32, help="of text to tokenize")
    parser.add_argument("--num-tokens", type=int, default=64_000_000, help="to pack and to read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--arguments", type=json.loads, default={})
    options = parser.parse_args()
    if options.case:
        print(json.dumps(globals()[f"case_{options.case}"](options.work, **options.arguments)))
    else:
        main(options.megabytes, options.num_tokens, options.repeats)
