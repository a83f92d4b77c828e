"""Writes tests/parity/fixtures/mds_* with mosaicml-streaming itself. Run where that package is installed:

    pip install mosaicml-streaming && python tests/parity/make_mds_fixtures.py

The committed files came from version 0.13.0. The samples are `sample(i)` below, so the test that reads the
fixtures makes its expectation from the same function.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
COUNT = 9
VARIANTS: dict[str, dict[str, Any]] = {
    "mds_plain": {"hashes": []},
    "mds_hashed": {"hashes": ["sha1", "xxh64"], "size_limit": 900},
    "mds_zstd": {"compression": "zstd:7", "hashes": ["sha256", "xxh3_64"], "size_limit": 2000},
    "mds_gz": {"compression": "gz", "hashes": ["md5"], "size_limit": 2000},
}
COLUMNS = {
    "input_ids": "ndarray:uint32",
    "indices": "ndarray:uint32",
    "mask": "ndarray:uint8",
    "any_array": "ndarray",
    "fixed_array": "ndarray:int16:2,3",
    "domain": "str",
    "length": "int",
    "blob": "bytes",
    "meta": "json",
    "digits": "str_int",
    "small": "uint8",
    "real": "float32",
    "wide": "int64",
}


def sample(number: int) -> dict[str, Any]:
    """Sample `number` of every fixture; lengths cross the sizes at which the shape's dtype grows."""
    length = 5 + number * 37
    cut = 1 + number
    return {
        "input_ids": (np.arange(length) * 7919 % 128256).astype(np.uint32),
        "indices": np.array([[0, cut], [cut, length]], np.uint32),
        "mask": (np.arange(length) % 3 == 0).astype(np.uint8),
        "any_array": np.linspace(0, 1, 4, dtype=np.float64).reshape(2, 2) * number,
        "fixed_array": np.arange(6, dtype=np.int16).reshape(2, 3) - number,
        "domain": f"Bücher/{number}",
        "length": length,
        "blob": bytes(range(number)),
        "meta": {"number": number, "tags": ["a", "ß"]},
        "digits": 10**20 + number,
        "small": 250 + number % 5,
        "real": number / 3,
        "wide": -(2**40) - number,
    }


def main() -> None:
    from streaming import MDSWriter

    for name, options in VARIANTS.items():
        out = FIXTURES / name
        shutil.rmtree(out, ignore_errors=True)
        with MDSWriter(out=str(out), columns=COLUMNS, **options) as writer:
            for number in range(COUNT):
                writer.write(sample(number))


if __name__ == "__main__":
    main()
