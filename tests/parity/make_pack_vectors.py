"""Writes fixtures/pack_vectors.json with the packing functions of CodeCreator/datatools (commit 56f591b).

    pip install datatools-py mosaicml-streaming && python tests/parity/make_pack_vectors.py

Each case holds the documents' lengths, the options and the packs that datatools.scripts.pack.pack_fn gave in
one process. A document's tokens are its number times 1000 plus 0, 1, 2, …, so the tokens tell where they are
from. `subset` is the directory below the output that datatools would write to. Overlap is left out: datatools
repeats the end of every full pack in the next one, even where no document was cut.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"options": {"pack_length": 16}},
    {"options": {"pack_length": 16, "min_length": 5}, "shortest": 5},
    {"options": {"pack_length": 16, "intact": True}},
    {"options": {"pack_length": 16, "bos_id": 7, "eos_id": 9}},
    {"options": {"pack_length": 8, "split_by_lengths": [8]}},
    {"options": {"pack_length": 32, "split_by_lengths": [8, 32]}},
    {"options": {"pack_length": 32, "split_by_lengths": [8, 16, 32]}},
    {"options": {"pack_length": 32, "split_by_lengths": [8, 16], "intact": True}},
]


def documents(lengths: list[int]) -> list[dict[str, Any]]:
    return [
        {"input_ids": (number * 1000 + np.arange(length)).astype(np.uint32)}
        for number, length in enumerate(lengths, 1)
    ]


def main() -> None:
    from datatools.scripts.pack import PackOptions, pack_fn

    vectors = []
    for number, case in enumerate(CASES):
        rng = random.Random(number)
        lengths = [rng.choice([1, 2, 7, 8, 9, 16, 31, 40, 100]) for _ in range(30)]
        lengths = [max(length, case.get("shortest", 1)) for length in lengths]
        packs = [
            {
                "subset": str(subset),
                "input_ids": item["input_ids"].tolist(),
                "indices": item["indices"].tolist(),
                "length": item["length"],
            }
            for subset, item in pack_fn(documents(lengths), None, 0, PackOptions(**case["options"]))
        ]
        vectors.append({"lengths": lengths, "options": case["options"], "packs": packs})
    path = Path(__file__).parent / "fixtures" / "pack_vectors.json"
    path.write_text(json.dumps(vectors, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
