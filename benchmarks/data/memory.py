"""Peak memory of every step of the data engine as its input grows.

    python benchmarks/data/memory.py --megabytes 100 1000 5000 --tokenize-megabytes 30 100 300
    python benchmarks/data/memory.py --only tokenize_document

Each step runs in a fresh process with one worker and its memory is sampled every 20 ms. Counted is what
belongs to the process (RssAnon); the pages of mapped files are the kernel's to take back. The larger inputs of the
steps after tokenizing repeat the tokens of the first. Writes memory.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__)
sys.path.insert(0, str(HERE.parents[1]))
TOKENS_PER_MEGABYTE = 280_000  # of this text with this tokenizer


def peak_mib(function: Callable[[], object]) -> float:
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return round(peak, 1)


def step_tokenize(work: Path) -> None:
    from megatron_prolong.data.tokenize import tokenize

    tokenize([str(work / "corpus.jsonl")], work / "tok", work / "out")


def step_tokenize_document(work: Path) -> None:
    """All the text as one document."""
    from megatron_prolong.data.tokenize import tokenize

    tokenize([str(work / "document.txt")], work / "tok", work / "out")


def step_group(work: Path) -> None:
    from megatron_prolong.data.group import GroupOptions, group

    group([str(work / "corpus.jsonl")], work / "out", GroupOptions("repository"))


def step_read_grouped(work: Path) -> None:
    """Every repository, as tokenize does."""
    from megatron_prolong.data.sources import source_of

    source = source_of("grouped")
    for part in source.parts(str(work / "rows")):
        for _ in source.read(part):
            pass


def step_filter(work: Path) -> None:
    from megatron_prolong.data.filter import FilterOptions, filter_documents

    filter_documents([work / "documents"], work / "out", FilterOptions(min_length={"": 100}))


def step_duplicates(work: Path) -> None:
    from megatron_prolong.data.filter import FilterOptions, filter_documents

    filter_documents([work / "documents"], work / "out", FilterOptions(duplicates=True))


def step_pack_concat(work: Path) -> None:
    from megatron_prolong.data.pack import PackOptions, pack

    pack([work / "documents"], work / "out", PackOptions(65_536, "concat", shuffle_seed=0))


def step_pack_single(work: Path) -> None:
    from megatron_prolong.data.pack import PackOptions, pack

    pack([work / "documents"], work / "out", PackOptions(65_536, "single", lengths=(4096, 16_384)))


def step_pack_bestfit(work: Path) -> None:
    from megatron_prolong.data.pack import PackOptions, pack

    pack([work / "documents"], work / "out", PackOptions(65_536, "bestfit"))


def step_inspect(work: Path) -> None:
    from megatron_prolong.data.inspect import survey

    survey(work / "documents")


def step_verify(work: Path) -> None:
    from megatron_prolong.data.verify import verify

    assert not verify(work / "documents", 32_000).problems


def step_mixture(work: Path) -> None:
    """Every pack once, in the order of a training run, copied as training does."""
    from megatron_prolong.data.mds import MDSReader
    from megatron_prolong.data.mixture import Mixture

    directory = work / "packs"
    num_steps = len(MDSReader(directory)) // 8
    mixture = Mixture(
        {directory: 1.0}, sequence_length=65_536, batch_sequences=8, seed=0, num_steps=num_steps
    )
    for step in range(num_steps):
        for ref in mixture.batch(step):
            mixture.read(ref)


STEPS = [name.removeprefix("step_") for name in globals() if name.startswith("step_")]
OF_TEXT = ("tokenize", "group", "read_grouped")


def fresh(step: str, work: Path) -> float:
    command = [sys.executable, str(HERE), "--step", step, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(step, result, file=sys.stderr, flush=True)
    return result["peak_mib"]


def main(options: argparse.Namespace) -> None:
    from corpus import write_document, write_jsonl, write_repeated, write_tokenizer
    from measure import machine

    from megatron_prolong.data.group import GroupOptions, group
    from megatron_prolong.data.pack import PackOptions, pack
    from megatron_prolong.data.tokenize import tokenize

    path = HERE.parent / "memory.json"
    peaks: dict[str, dict[str, float]] = {}
    if options.only:
        peaks = json.loads(path.read_bytes())["peak_mib_by_megabytes_of_text"]
    wanted = options.only or STEPS
    peaks |= {step: {} for step in wanted}

    def save() -> None:
        result: dict[str, Any] = {"machine": machine(), "peak_mib_by_megabytes_of_text": peaks}
        path.write_text(json.dumps(result, indent=2) + "\n")

    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        work = Path(name)
        write_tokenizer(work / "tok")
        later = [step for step in wanted if step not in (*OF_TEXT, "tokenize_document")]
        if later:
            write_jsonl(work / "corpus.jsonl", 100 << 20)
            tokenize([str(work / "corpus.jsonl")], work / "tok", work / "source")
        for size in options.megabytes if later else []:
            write_repeated(work / "source", work / "documents", size * TOKENS_PER_MEGABYTE)
            if "mixture" in later:
                pack([work / "documents"], work / "packs", PackOptions(65_536, "concat"))
            for step in later:
                peaks[step][str(size)] = fresh(step, work)
                save()
            shutil.rmtree(work / "documents")
            shutil.rmtree(work / "packs", ignore_errors=True)
        for size in options.document_megabytes if "tokenize_document" in wanted else []:
            write_document(work / "document.txt", size << 20)
            peaks["tokenize_document"][str(size)] = fresh("tokenize_document", work)
            save()
        of_text = [step for step in wanted if step in OF_TEXT]
        for size in options.tokenize_megabytes if of_text else []:
            write_jsonl(work / "corpus.jsonl", size << 20)
            if "read_grouped" in of_text:
                group([str(work / "corpus.jsonl")], work / "rows", GroupOptions("repository"))
            for step in of_text:
                peaks[step][str(size)] = fresh(step, work)
                save()
            shutil.rmtree(work / "rows", ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--tokenize-megabytes", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--document-megabytes", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--only", choices=STEPS, nargs="+", help="measure these again, keep the others")
    parser.add_argument("--scratch", type=Path, help="where there is room for three times the largest")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    if options.step:
        print(json.dumps({"peak_mib": peak_mib(lambda: globals()[f"step_{options.step}"](options.work))}))
    else:
        main(options)
