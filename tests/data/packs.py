"""Small packed data sets for the tests of this room."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_prolong.data.mds import MDSReader, MDSWriter

COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "int"}


def write_packs(
    directory: Path,
    packs: Sequence[Sequence[Sequence[int]]],
    *,
    masks: Sequence[Sequence[Sequence[int]]] | None = None,
    domain: str = "test",
    size_limit: int = 1 << 26,
    compression: str | None = None,
    hashes: Sequence[str] = (),
) -> Path:
    """One sample per pack, each a list of documents, each a list of token ids (masks likewise)."""
    columns = COLUMNS | ({"mask": "ndarray:uint8"} if masks is not None else {})
    with MDSWriter(
        directory, columns, size_limit=size_limit, compression=compression, hashes=hashes
    ) as writer:
        for number, documents in enumerate(packs):
            tokens = np.array([token for document in documents for token in document], np.uint32)
            ends = np.cumsum([len(document) for document in documents])
            starts = ends - [len(document) for document in documents]
            sample = {
                "input_ids": tokens,
                "indices": np.stack([starts, ends], axis=1).astype(np.uint32),
                "domain": domain,
                "length": len(tokens),
            }
            if masks is not None:
                sample["mask"] = np.array([bit for mask in masks[number] for bit in mask], np.uint8)
            writer.write(sample)
    return directory


def add_foreign_columns(directory: Path) -> None:
    """As other writers leave it: beside the tokens an object in a pickle, and a price."""
    reader = MDSReader(directory)
    others = {"extra": "bytes", "price": "str"}
    with MDSWriter(directory.with_suffix(".new"), {**reader.columns, **others}) as writer:
        for sample in reader:
            writer.write({**sample, "extra": b"\x80\x04N.", "price": "0.5"})
    shutil.rmtree(directory)
    directory.with_suffix(".new").rename(directory)
    index = directory / "index.json"
    content = json.loads(index.read_text())
    for shard in content["shards"]:
        types = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        shard["column_encodings"] = list((types | {"extra": "pkl", "price": "str_decimal"}).values())
    index.write_text(json.dumps(content))


def record_tokenizer(directory: Path, fingerprint: str = "0123456789abcdef") -> None:
    """As if a tokenizer of this fingerprint had made the data set."""
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | {"tokenizer": fingerprint}))


def numbered_packs(count: int, sequence_length: int = 8, first: int = 0) -> list[list[list[int]]]:
    """`count` packs whose first token is their number, so that a sample can be recognised."""
    return [
        [
            [first + number, *range(1, sequence_length // 2)],
            list(range(sequence_length - sequence_length // 2)),
        ]
        for number in range(count)
    ]
