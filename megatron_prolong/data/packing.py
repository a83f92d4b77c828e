"""Which part of which document goes into which pack: pure functions of the documents' lengths.

A document here is (number, length), where the length includes a beginning or end of text to be added.
A piece is (document, start, stop); a pack is a list of pieces. Nothing looks at tokens, so a plan of
billions of tokens takes seconds, and what executes it may be cut among any number of workers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

Document = tuple[int, int]
Piece = tuple[int, int, int]
Pack = list[Piece]

_WINDOW_DOCUMENTS = 1 << 18
"""Best fit looks at so many documents at a time, to keep memory flat; each window leaves a few packs unfull."""


@dataclass(frozen=True)
class Rules:
    """length: tokens of a pack. min_length: documents, and remainders of documents, below it are dropped.
    overlap: tokens that a document's next piece repeats, fewer than a pack or chunk has. intact: drop the rest of
    a document that was cut, so that every piece begins where its document begins."""

    length: int
    min_length: int = 1
    overlap: int = 0
    intact: bool = False


@dataclass
class Losses:
    """Tokens that were dropped, by reason, and tokens that were repeated by overlap."""

    dropped: Counter[str] = field(default_factory=Counter)
    repeated: int = 0


def concatenate(documents: Iterable[Document], rules: Rules, losses: Losses) -> Iterator[Pack]:
    """Fill packs with one document after the other; what does not fit begins the next pack.

    ProLong's rule for short documents, and with `intact` for chats. The last pack is dropped if not full.
    """
    pack: Pack = []
    room = rules.length
    for document, length in documents:
        if length < rules.min_length:
            losses.dropped["document below min_length"] += length
            continue
        start = 0
        while length - start >= room:
            cut = start + room
            yield [*pack, (document, start, cut)]
            pack, room = [], rules.length
            start = _next_start(cut, length, rules, losses)
        if start < length:
            pack.append((document, start, length))
            room -= length - start
    losses.dropped["last pack not full"] += rules.length - room


def _next_start(cut: int, length: int, rules: Rules, losses: Losses) -> int:
    """Where a document cut at `cut` goes on in the next pack; `length` if it does not."""
    if cut == length:
        return length
    start = max(cut - rules.overlap, 0)
    if rules.intact:
        losses.dropped["rest of a cut document"] += length - cut
        return length
    if length - start < rules.min_length:
        losses.dropped["remainder below min_length"] += length - cut
        return length
    losses.repeated += cut - start
    return start


def cut_by_lengths(
    documents: Iterable[Document], lengths: Iterable[int], rules: Rules, losses: Losses
) -> Iterator[tuple[int, Piece]]:
    """Cut each document into chunks of the largest of `lengths` that still fits: (chunk length, chunk).

    ProLong's rule for long documents: what is shorter than the shortest length is dropped.
    """
    descending = sorted(lengths, reverse=True)
    shortest = descending[-1]
    for document, length in documents:
        if length < max(shortest, rules.min_length):
            losses.dropped["document shorter than a chunk"] += length
            continue
        start = stop = 0
        while length - start >= shortest:
            losses.repeated += stop - start
            chunk = next(each for each in descending if length - start >= each)
            stop = start + chunk
            yield chunk, (document, start, stop)
            if rules.intact:
                break
            start = stop - rules.overlap
        losses.dropped["remainder shorter than a chunk"] += length - stop


def best_fit(documents: Iterable[Document], rules: Rules, losses: Losses) -> Iterator[Pack]:
    """Best-fit decreasing: no document that fits into a pack is cut; packs may be less than full.

    Documents longer than a pack fill packs of their own, and their remainder is placed like a document.
    After Ding et al., "Fewer Truncations Improve Language Modeling" (2024).
    """
    stream = iter(documents)
    while window := list(islice(stream, _WINDOW_DOCUMENTS)):
        pieces: list[Piece] = []
        for document, length in window:
            if length < rules.min_length:
                losses.dropped["document below min_length"] += length
                continue
            start = 0
            while length - start >= rules.length:
                cut = start + rules.length
                yield [(document, start, cut)]
                start = _next_start(cut, length, rules, losses)
            if start < length:
                pieces.append((document, start, length))
        pieces.sort(key=lambda piece: piece[1] - piece[2])
        yield from _fit(pieces, rules.length)


def _fit(pieces: Iterable[Piece], length: int) -> list[Pack]:
    """Each piece into the pack with the least room that suffices, else into a new one."""
    packs: list[Pack] = []
    with_room: dict[int, list[int]] = {}  # room left -> numbers of the packs that have it
    rooms: list[int] = []  # its keys, sorted
    for piece in pieces:
        need = piece[2] - piece[1]
        at = bisect_left(rooms, need)
        if at == len(rooms):
            number, room = len(packs), length
            packs.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        packs[number].append(piece)
        left = room - need
        if left in with_room:
            with_room[left].append(number)
        elif left:
            with_room[left] = [number]
            insort(rooms, left)
    return packs
