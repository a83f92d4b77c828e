"""Exact duplicates: documents with the same tokens as an earlier one; some 40 bytes of memory per document."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray


def find_duplicates(documents: Iterable[NDArray[np.uint32]]) -> NDArray[np.bool_]:
    """bool [documents]: True where an earlier document has the same tokens (equal 128-bit hashes)."""
    digests = bytearray()
    for tokens in documents:
        digests += xxhash.xxh3_128_digest(tokens.data)
    hashes = np.frombuffer(digests, "V16")
    _, first = np.unique(hashes, return_index=True)
    duplicate = np.ones(len(hashes), bool)
    duplicate[first] = False
    return duplicate
