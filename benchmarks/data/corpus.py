"""Real text for the benchmarks: sources and documentation of the packages installed here."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
MAX_FILE_BYTES = 400_000


def texts() -> Iterator[str]:
    """Every file once, in an order that mixes the packages; then again from the start, for ever."""
    roots = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
    files = sorted({file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES})
    files = [file for file in files if 0 < file.stat().st_size < MAX_FILE_BYTES]
    random.Random(0).shuffle(files)
    for file in cycle(files):
        yield file.read_text(encoding="utf-8", errors="ignore") or "\n"


def write_jsonl(path: Path, num_bytes: int) -> int:
    """At least num_bytes of text as JSON Lines, of 1000 repositories; returns the bytes of the text."""
    written = number = 0
    source = texts()
    with path.open("w", encoding="utf-8") as out:
        while written < num_bytes:
            text = next(source)
            written += len(text.encode())
            out.write(json.dumps({"text": text, "repository": f"owner/{number % 1000}"}) + "\n")
            number += 1
    return written


def write_document(path: Path, num_bytes: int) -> None:
    """At least num_bytes as a single text."""
    source = texts()
    with path.open("w", encoding="utf-8") as out:
        while out.tell() < num_bytes:
            out.write(next(source))


def write_tokenizer(path: Path) -> None:
    """Byte-level BPE of 32K words with Llama-3's regex, trained on the first texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from megatron_prolong.data.encoder import _GPT4_STYLE

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_GPT4_STYLE % "{1,3}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    training = (text for _, text in zip(range(300), texts(), strict=False))
    tokenizer.train_from_iterator(training, trainers.BpeTrainer(vocab_size=32_000, show_progress=False))
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))


def write_repeated(source: Path, path: Path, num_tokens: int) -> None:
    """The documents of a tokenized data set, over and over, until they have num_tokens."""
    from megatron_prolong.data.mds import MDSReader, MDSWriter

    reader = MDSReader(source)
    with MDSWriter(path, reader.columns) as writer:
        for sample in cycle(reader):
            writer.write(sample)
            num_tokens -= len(sample["input_ids"])
            if num_tokens <= 0:
                return
