"""Exact duplicates: documents with the same tokens as an earlier one; some 40 bytes of memory per document."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray


def find_duplicates(documents: Iterable[NDArray[np.uint32] | None]) -> NDArray[np.bool_]:
    """bool [documents]: True where an earlier document has the same tokens (equal 128-bit hashes).

    None stands for a document that is dropped anyway: no later one is its duplicate.
    """
    digests = bytearray()
    for number, tokens in enumerate(documents):
        digests += (
            xxhash.xxh3_128_digest(tokens.data) if tokens is not None else number.to_bytes(16, "little")
        )
    hashes = np.frombuffer(digests, "V16")
    _, first = np.unique(hashes, return_index=True)
    duplicate = np.ones(len(hashes), bool)
    duplicate[first] = False
    return duplicate
