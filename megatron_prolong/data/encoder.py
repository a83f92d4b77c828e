"""Texts to token ids through the Rust tokenizer, in bounded memory and exactly as if each were encoded whole.

The library's result holds some hundred bytes per token (strings, offsets), so a long document is encoded in
segments. A segment may only end where the tokenizer's own splitting regex ends a match whatever follows:
after a single newline between two visible characters, or before a blank that follows on a visible character, as
blanks only begin a match or are all of it. That is true of byte-level tokenizers with GPT-2's or Llama-3's regex;
for any other documents are encoded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import fingerprint, tokenizer_file

SEGMENT_CHARACTERS = 1 << 17
_BATCH_CHARACTERS = 1 << 19
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= )")
_SEARCH_CHARACTERS = 1 << 12


class TextEncoder:
    """directory: a tokenizer's, a Hugging Face model's, or a checkpoint's.

    Nothing is added to a text: no beginning or end of text, no truncation; and the names of special tokens
    inside a text (`<|eot_id|>`) are text like any other. Raises UserError for a missing or damaged file.
    """

    def __init__(self, directory: Path | str) -> None:
        self._tokenizer = load_tokenizer(directory)
        content = json.loads(self._tokenizer.to_str())
        self.splits = _may_be_split(content)
        self.fingerprint = fingerprint(content)
        self.forced_cuts = 0

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, uint32 [n]. Memory beyond texts and ids does not grow with them."""
        pieces: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        owners: list[int] = []
        batch: list[str] = []
        room = _BATCH_CHARACTERS
        for owner, text in enumerate(texts):
            for segment in self._segments(text):
                owners.append(owner)
                batch.append(segment)
                room -= len(segment)
                if room <= 0:
                    self._encode_batch(batch, owners, pieces)
                    owners, batch, room = [], [], _BATCH_CHARACTERS
        self._encode_batch(batch, owners, pieces)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in pieces]

    def _encode_batch(
        self, batch: list[str], owners: list[int], pieces: list[list[NDArray[np.uint32]]]
    ) -> None:
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for owner, encoding in zip(owners, encodings, strict=True):
            pieces[owner].append(np.array(encoding.ids, np.uint32))

    def _segments(self, text: str) -> Iterator[str]:
        start = 0
        while self.splits and len(text) - start > SEGMENT_CHARACTERS:
            end = start + SEGMENT_CHARACTERS
            cut = _last_cut(text, end - _SEARCH_CHARACTERS, end) or _last_cut(text, start, end)
            if cut is None:
                cut = end
                self.forced_cuts += 1
            yield text[start:cut]
            start = cut
        yield text[start:]


def load_tokenizer(directory: Path | str) -> Any:
    """The Rust tokenizer of such a directory; names of special tokens inside a text are text to it.

    Raises UserError for a missing or damaged file.
    """
    path = tokenizer_file(directory)
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # measured: of every tokenizer that was loaded, the library keeps 8 MB for ever
def _load(path: Path, modified: int) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: not a tokenizer the tokenizers library can read ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _last_cut(text: str, start: int, end: int) -> int | None:
    """The last position in (start, end] where a segment may end. One character beyond `end` is looked at."""
    last = None
    for match in _SAFE_CUT.finditer(text, start + 1, end + 1):
        last = match.start()
    return last


def _may_be_split(tokenizer: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer splits by a known regex into bytes and adds no blank in front, and no added token
    holds a place to cut; see the module."""
    normalizer = tokenizer["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    if any(map(_may_be_cut, tokenizer["added_tokens"])):
        return False
    splitter = tokenizer["pre_tokenizer"] or {"type": None}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    regexes = [step for step in steps if step["type"] == "Split" and step["behavior"] == "Isolated"]
    if (
        len(byte_level) != 1
        or len(byte_level) + len(regexes) != len(steps)
        or byte_level[0]["add_prefix_space"]
    ):
        return False
    patterns = {step["pattern"].get("Regex") for step in regexes}
    return patterns <= _KNOWN_REGEXES and (bool(patterns) or bool(byte_level[0]["use_regex"]))


def _may_be_cut(added: dict[str, Any]) -> bool:
    """Whether a segment may end inside an added token or a blank that goes with it; special ones are text here."""
    text = f"x{added['content']}x"  # with what may be around it
    within = any(1 < match.start() < len(text) - 1 for match in _SAFE_CUT.finditer(text))
    return bool(not added["special"] and (within or added["lstrip"] or added["rstrip"]))


_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama-3's, Qwen-2's and GPT-2's (which ByteLevel has built in); _SAFE_CUT holds for each.
_KNOWN_REGEXES = {
    _GPT4_STYLE % "{1,3}",
    _GPT4_STYLE % "",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
