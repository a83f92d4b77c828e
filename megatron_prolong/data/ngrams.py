r"""Finding text of evaluation sets inside documents: a document that shares an n-gram of words is contaminated.

Words are what \w+ finds in the lower-cased text, so punctuation, blanks and case do not hide a copy. Chinese and
Japanese, written without blanks, would be words as long as a clause: there, as in BERT, each character is one. An
n-gram is a 64-bit hash of the numbers of its words in the evaluation sets' own vocabulary; words that
no evaluation set has break an n-gram at once. That makes the search a few numpy operations per document.
After the 13-gram overlap of Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.sources import Bad, find_kind, source_of
from megatron_prolong.errors import UserError

_ALONE = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
)
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in Fibonacci hashing
DEFAULT_N = 13


class NgramIndex:
    """All n-grams of the texts; a text of fewer than n words has none."""

    def __init__(self, texts: Iterable[str], n: int = DEFAULT_N) -> None:
        self.n = n
        self._numbers: dict[str, int] = {}
        hashes: list[NDArray[np.uint64]] = []
        for text in texts:
            words = _WORD.findall(text.lower())
            if len(words) < n:
                continue
            for word in words:
                self._numbers.setdefault(word, len(self._numbers) + 1)
            hashes.append(self._hashes(self._lookup(words)))
        self._hashes_sorted = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)

    def __len__(self) -> int:
        return len(self._hashes_sorted)

    def _lookup(self, words: Sequence[str]) -> NDArray[np.uint64]:
        return np.array([self._numbers.get(word, 0) for word in words], np.uint64)

    def _hashes(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Hash of the n-gram that begins at each word, uint64 [words - n + 1]."""
        count = len(numbers) - self.n + 1
        total = np.zeros(count, np.uint64)
        for offset in range(self.n):
            total = (total ^ numbers[offset : offset + count]) * _MULTIPLIER
            total ^= total >> np.uint64(29)
        return total

    def find(self, text: str) -> list[str]:
        """The distinct n-grams of `text` that an evaluation set has, in the order of the text."""
        words = _WORD.findall(text.lower())
        numbers = self._lookup(words)
        known = np.concatenate([[0], np.cumsum(numbers > 0)])
        starts = np.flatnonzero(known[self.n :] - known[: -self.n] == self.n)
        if not len(starts):
            return []
        hashes = self._hashes(numbers)[starts]
        found = np.searchsorted(self._hashes_sorted, hashes)
        found[found == len(self)] = 0
        hits = starts[self._hashes_sorted[found] == hashes]
        return list(dict.fromkeys(" ".join(words[start : start + self.n]) for start in hits))


def evaluation_texts(paths: Sequence[str]) -> Iterator[str]:
    """Every text in the files: text files whole; of JSON Lines and tables every string, however deep.

    Raises UserError for a file that cannot be read.
    """
    for path in paths:
        source = source_of(find_kind(path))
        for part in source.parts(path):
            if Path(part.path).suffix == ".json" and Path(part.path).is_file():
                if not part.start:  # a large file has several parts
                    yield from _json_file(part.path)
                continue
            for record in source.read(part):
                if isinstance(record, Bad):
                    raise UserError(f"{record.name} {record.problem}")
                yield from _strings(record.fields)


def _json_file(path: str) -> Iterator[str]:
    """A .json file is one JSON document, or JSON Lines by another name."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            yield from _strings(json.loads(text))
        except ValueError:
            yield from _strings([json.loads(line) for line in text.split("\n") if line.strip()])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: neither JSON nor JSON Lines ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)
