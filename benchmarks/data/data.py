"""The data engine beside its peers: tokenizing, packing, reading, and how memory grows with the input.

    PROLONG_STREAMING_PYTHON=python-with-datatools python benchmarks/data/data.py

Peers run in the interpreter named above, which needs mosaicml-streaming and datatools; without it they are
left out. Every number is CPU seconds (user and system) of one process with one thread: ours and the peer's in
the same run, one after the other, so that other work on the machine weighs on both alike. Writes data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
PEER = os.environ.get("PROLONG_STREAMING_PYTHON", "")
HERE = Path(__file__)


def measured(function: Callable[[], object]) -> dict[str, float]:
    """CPU seconds, and the peak of memory that is the process's own (mapped files do not count)."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    function()
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    return {"cpu_seconds": round(seconds, 2), "peak_mib": round(peak[0], 1)}


def write_corpus(path: Path, num_bytes: int) -> int:
    """Python's own sources as JSON Lines, repeated up to num_bytes; returns the number of documents."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    files = [file for file in files if "site-packages" not in file.parts and file.stat().st_size < 400_000]
    written = count = 0
    with path.open("w", encoding="utf-8") as out:
        while written < num_bytes:
            text = files[count % len(files)].read_text(encoding="utf-8", errors="ignore")
            written += out.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def write_tokenizer(path: Path) -> None:
    """Byte-level BPE of 32K words with Llama-3's regex, trained on Python's sources."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from megatron_prolong.data.encoder import _GPT4_STYLE

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_GPT4_STYLE % "{1,3}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    files = [str(file) for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]]
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=32_000, show_progress=False))
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))


def write_documents(path: Path, num_tokens: int) -> None:
    """Random tokens in documents of some 3,000 tokens, lengths log-normal as texts' are."""
    import numpy as np

    from megatron_prolong.data.mds import MDSWriter

    rng = np.random.default_rng(0)
    left = num_tokens
    with MDSWriter(path, {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}) as writer:
        while left > 0:
            length = int(rng.lognormal(7.5, 1.0)) + 1
            tokens = rng.integers(0, 128_256, length, dtype=np.uint32)
            writer.write({"input_ids": tokens, "length": length, "domain": "text"})
            left -= length


# Cases: each runs in a fresh process and prints one JSON object.


def case_tokenize(work: Path) -> dict[str, Any]:
    from megatron_prolong.data.tokenize import tokenize

    report: list[Any] = []
    result = measured(
        lambda: report.append(tokenize([str(work / "corpus.jsonl")], work / "tok", work / f"t{os.getpid()}"))
    )
    return result | {"tokens": report[0].tokens}


def case_encode_batch(work: Path) -> dict[str, Any]:
    """The library alone, texts already in memory, results thrown away: what no program can beat."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tok" / "tokenizer.json"))
    with (work / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]

    def run() -> None:
        for start in range(0, len(texts), 256):
            tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False)

    return measured(run)


def case_pack(work: Path) -> dict[str, Any]:
    from megatron_prolong.data.pack import PackOptions, pack

    out = work / "packs" if not (work / "packs").exists() else work / f"p{os.getpid()}"
    return measured(lambda: pack([work / "documents"], out, PackOptions(65_536, "concat")))


def case_datatools(work: Path) -> dict[str, Any]:
    from functools import partial

    from datatools import LoadOptions, ProcessOptions, load, process
    from datatools.scripts.pack import PackOptions, pack_fn

    data = load(work / "documents", options=LoadOptions())
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "length": "int", "domain": "str"}
    options = PackOptions(pack_length=65_536)
    process_options = ProcessOptions(columns=columns)
    return measured(
        lambda: process(data, partial(pack_fn, options=options), work / "theirs", process_options)
    )


def _read(data: Any, order: str, copy: bool) -> Callable[[], None]:
    import numpy as np

    numbers = np.arange(len(data))
    if order == "random":
        numbers = np.random.default_rng(0).permutation(numbers)

    def run() -> None:
        for number in numbers.tolist():
            tokens = data[number]["input_ids"]
            if copy:  # ours is a view of the file: read it all, as training does
                np.array(tokens)

    return run


def case_read(work: Path, directory: str, order: str) -> dict[str, Any]:
    from megatron_prolong.data.mds import MDSReader

    return measured(_read(MDSReader(work / directory), order, copy=True))


def case_streaming(work: Path, directory: str, order: str) -> dict[str, Any]:
    from streaming import LocalDataset

    return measured(_read(LocalDataset(str(work / directory)), order, copy=False))


def case_raw(work: Path, directory: str) -> dict[str, Any]:
    """The bytes of the shards read front to back: the file system's own speed."""

    def run() -> None:
        buffer = bytearray(1 << 20)
        for path in sorted((work / directory).rglob("*.mds")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return measured(run)


def fresh(python: str, case: str, work: Path, **arguments: str) -> dict[str, Any]:
    if not python:
        return {"left_out": "PROLONG_STREAMING_PYTHON is not set"}
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE), "--case", case, "--work", str(work), "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(case, arguments, result, file=sys.stderr, flush=True)
    return result


def ratio(peer: dict[str, Any], ours: dict[str, Any]) -> float | None:
    """How many times faster ours is."""
    if "cpu_seconds" not in peer or "cpu_seconds" not in ours:
        return None
    return round(peer["cpu_seconds"] / max(ours["cpu_seconds"], 0.01), 2)


def save(results: dict[str, Any]) -> None:
    (HERE.parent / "data.json").write_text(json.dumps(results, indent=2) + "\n")


def main(megabytes: int, num_tokens: int) -> None:
    """Runs everything; data.json holds what is finished so far."""
    from measure import machine

    me = sys.executable
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_tokenizer(work / "tok")
        write_corpus(work / "corpus.jsonl", megabytes << 20)
        ours, raw = fresh(me, "tokenize", work), fresh(me, "encode_batch", work)
        results["tokenize"] = {
            "megabytes": megabytes,
            "ours": ours,
            "encode_batch": raw,
            "ratio": ratio(raw, ours),
        }
        save(results)
        write_documents(work / "documents", num_tokens)
        ours, peer = fresh(me, "pack", work), fresh(PEER, "datatools", work)
        results["pack"] = {"tokens": num_tokens, "ours": ours, "datatools": peer, "ratio": ratio(peer, ours)}
        save(results)
        for directory in ("packs", "documents"):
            raw = fresh(me, "raw", work, directory=directory)
            for order in ("sequential", "random"):
                ours = fresh(me, "read", work, directory=directory, order=order)
                peer = fresh(PEER, "streaming", work, directory=directory, order=order)
                results[f"read {directory}, {order}"] = {
                    "ours": ours, "streaming": peer, "ratio": ratio(peer, ours), "raw_bytes": raw,
                }  # fmt: skip
                save(results)
    results["memory"] = memory(megabytes, num_tokens)
    save(results)


def memory(megabytes: int, num_tokens: int) -> list[dict[str, Any]]:
    """Peak of our own memory at a quarter, one and four times the input."""
    rows = []
    for factor in (0.25, 1, 4):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            write_tokenizer(work / "tok")
            write_corpus(work / "corpus.jsonl", int(megabytes * factor) << 20)
            write_documents(work / "documents", int(num_tokens * factor))
            row = {"megabytes": megabytes * factor, "tokens": int(num_tokens * factor)}
            row |= {
                f"{case}_peak_mib": fresh(sys.executable, case, work)["peak_mib"]
                for case in ("tokenize", "pack")
            }
            rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, default=16_000_000)
    parser.add_argument("--case")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--arguments", type=json.loads, default={})
    options = parser.parse_args()
    if options.case:
        print(json.dumps(globals()[f"case_{options.case}"](options.work, **options.arguments)))
    else:
        main(options.megabytes, options.num_tokens)
