"""Held-out documents for perplexity, and haystacks: data sets of ours, JSON Lines, Parquet, text, or folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSReader, common_tokenizer, read_index
from megatron_prolong.data.packed import Identity, PackedSequence, open_tokens, read_boundaries
from megatron_prolong.data.sources import Bad, find_kind, jsonl, source_of
from megatron_prolong.data.sources.files import COMPRESSED
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import tokenizer_fingerprint

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
RECORD_SUFFIXES = {*jsonl.SUFFIXES, ".parquet", *COMPRESSED}  # their bytes are not the text that is meant
TEXT_FIELD = "text"  # of their records


@dataclass(frozen=True, eq=False)
class Passage:
    """The first tokens of one document: int64 [S]; `name` says which."""

    name: str
    tokens: NDArray[np.int64]


def read_passages(data: Sequence[Path], tokenizer: Any, length: int, count: int, seed: int) -> list[Passage]:
    """`count` passages of exactly `length` tokens, one per document that is long enough, chosen by `seed`.

    Raises:
        UserError: no document is that long (naming the longest found), or a path holds no documents.
    """
    longest = 0
    found: list[_Document] = []
    for path in data:
        for document in _documents(path, tokenizer):
            longest = max(longest, document.num_tokens)
            if document.num_tokens >= length:
                found.append(document)
    if not found:
        raise UserError(
            f"{', '.join(map(str, data))}: no document of {length:,} tokens, the longest has {longest:,}; "
            "give longer documents (packs of at least that length) or shorter --lengths"
        )
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [Passage(found[index].name, found[index].read()[:length].copy()) for index in sorted(chosen)]


def check_documents(data: Sequence[Path], models: Sequence[str]) -> None:
    """Look before a model is loaded.

    Raises:
        UserError: a path holds no documents, what is no text, or tokens of another tokenizer than a model's.
    """
    parts = [part for path in data for part in _parts(path)]
    packs = [part for part in parts if part.is_dir()]
    for file in parts:
        if file not in packs:
            next(_texts(file), None)
    made_with = {str(pack): read_index(pack).tokenizer for pack in packs}
    for model in models:
        common_tokenizer({**made_with, model: tokenizer_fingerprint(Path(model))})


def read_text(path: Path) -> str:
    """All text of a file or directory, for a haystack. Raises UserError when there is none."""
    texts = [text for file in _text_files(path) for _, text in _texts(file)]
    if not (words := " ".join(texts).split()):
        raise UserError(f"{path}: empty; a haystack needs text")
    return " ".join(words)


@dataclass(frozen=True)
class _Document:
    """A document whose tokens, int64 [num_tokens], are read when it is chosen: of a data set only few are."""

    name: str
    num_tokens: int
    read: Callable[[], NDArray[np.int64]]


def _documents(path: Path, tokenizer: Any) -> Iterator[_Document]:
    for part in _parts(path):
        if part.is_dir():
            yield from _packed_documents(part)
            continue
        for name, text in _texts(part):
            encode = partial(_encode, tokenizer, text)
            yield _Document(name, len(encode()), encode)


def _encode(tokenizer: Any, text: str) -> NDArray[np.int64]:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents in a file; a text file, whatever its ending, is one.

    Raises:
        UserError: it is no text, or a record has none.
    """
    source = source_of(find_kind(str(file)) if file.suffix.lower() in RECORD_SUFFIXES else "text")
    for part in source.parts(str(file)):
        for record in source.read(part):
            if isinstance(record, Bad):
                raise UserError(f"{record.name} {record.problem}")
            if source.kind == "text" and "\0" in record.fields[TEXT_FIELD]:
                raise UserError(f"{record.name} is not text: it holds a byte of zero")
            text = record.fields.get(TEXT_FIELD)
            if not isinstance(text, str):
                fields = ", ".join(
                    f"{name} ({type(value).__name__})" for name, value in record.fields.items()
                )
                raise UserError(
                    f"{record.name}: no text in the field {TEXT_FIELD}; it has {fields}; "
                    "`prolong data tokenize --text-field` makes a data set of others"
                )
            yield record.name, text


def _parts(path: Path) -> list[Path]:
    """Directories of MDS shards, or else files of text or records."""
    if (path / "index.json").exists():
        return [path]  # a merged index names the shards of the folders below
    return sorted(index.parent for index in path.rglob("index.json")) or _text_files(path)


def _packed_documents(directory: Path) -> Iterator[_Document]:
    reader = open_tokens(directory)
    for number, sample in enumerate(reader):
        identity = Identity.of(reader, number)
        edges = read_boundaries(sample.get("indices"), len(sample["input_ids"]), identity).tolist()
        for piece, (start, end) in enumerate(pairwise(edges)):
            read = partial(_read_packed, reader, number, slice(start, end))
            yield _Document(f"{identity}, document {piece}", end - start, read)


def _read_packed(reader: MDSReader, number: int, span: slice) -> NDArray[np.int64]:
    sequence = PackedSequence.from_sample(reader[number], Identity.of(reader, number))
    return sequence.tokens[span].astype(np.int64)


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*")) if path.is_dir() else []
    kinds = sorted(TEXT_SUFFIXES | RECORD_SUFFIXES)
    texts = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES]
    records = [file for file in found if file.suffix.lower() in RECORD_SUFFIXES]
    # Records beside texts are remarks on them, but a README beside records is one on those.
    about_records = records and all(file.stem.lower() == "readme" for file in texts)
    files = records if about_records else texts
    if not files:
        problem = "no text here" if path.exists() else "no such file or directory"
        raise UserError(
            f"{path}: {problem}; give a directory of MDS shards (`prolong data tokenize` makes it), a text "
            f"file, or a folder of {', '.join(kinds)}"
        )
    return files
