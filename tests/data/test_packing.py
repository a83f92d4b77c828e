"""Which piece of which document goes into which pack: properties that must hold for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.data import packing
from megatron_prolong.data.packing import Losses, Pack, Rules, best_fit, concatenate, cut_by_lengths

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
RULES = st.builds(
    Rules,
    length=st.integers(6, 20),
    min_length=st.integers(1, 9),
    overlap=st.integers(0, 5),
    intact=st.booleans(),
)


def total(pieces: Pack) -> int:
    return sum(stop - start for _, start, stop in pieces)


def check_account(lengths: list[int], packs: list[Pack], losses: Losses) -> None:
    assert sum(lengths) + losses.repeated == sum(map(total, packs)) + sum(losses.dropped.values())
    assert all(count >= 0 for count in losses.dropped.values())


def check_pieces(lengths: list[int], packs: list[Pack], rules: Rules) -> None:
    """Pieces lie in their documents, go forward, and only overlap by as much as the rules say."""
    seen: dict[int, int] = {}
    for document, start, stop in (piece for each in packs for piece in each):
        assert 0 <= start < stop <= lengths[document]
        assert start == 0 or seen[document] - rules.overlap <= start <= seen[document]
        assert start > 0 or seen.get(document, 0) <= rules.overlap
        assert not (rules.intact and start), "an intact piece begins where its document begins"
        seen[document] = stop


def check_min_length(lengths: list[int], packs: list[Pack], rules: Rules) -> None:
    for document, start, _ in (piece for each in packs for piece in each):
        assert lengths[document] - start >= rules.min_length


@given(LENGTHS, RULES)
def test_concatenate_loses_nothing_unnamed_and_fills_every_pack(lengths: list[int], rules: Rules) -> None:
    losses = Losses()
    packs = list(concatenate(enumerate(lengths), rules, losses))
    check_account(lengths, packs, losses)
    check_pieces(lengths, packs, rules)
    check_min_length(lengths, packs, rules)
    assert all(total(each) == rules.length for each in packs)
    assert [piece[0] for each in packs for piece in each] == sorted(
        piece[0] for each in packs for piece in each
    )


@given(LENGTHS, st.integers(6, 20))
def test_concatenate_by_default_only_loses_the_last_pack(lengths: list[int], length: int) -> None:
    losses = Losses()
    packs = list(concatenate(enumerate(lengths), Rules(length), losses))
    assert len(packs) == sum(lengths) // length
    assert +losses.dropped == {"last pack not full": sum(lengths) % length} or sum(lengths) % length == 0


@given(LENGTHS, st.sets(st.integers(6, 20), min_size=1), RULES)
def test_chunks_have_the_largest_length_that_fits(lengths: list[int], chunks: set[int], rules: Rules) -> None:
    losses = Losses()
    cut = list(cut_by_lengths(enumerate(lengths), chunks, rules, losses))
    packs = [[piece] for _, piece in cut]
    check_account(lengths, packs, losses)
    check_pieces(lengths, packs, rules)
    for chunk, (document, start, stop) in cut:
        assert stop - start == chunk in chunks
        assert not any(chunk < other <= lengths[document] - start for other in chunks)
    ends = {document: stop for _, (document, _, stop) in cut}
    assert list(ends) == [
        n for n, length in enumerate(lengths) if length >= max(min(chunks), rules.min_length)
    ]
    for document, stop in ends.items():
        left = 0 if rules.intact or stop == lengths[document] else lengths[document] - stop + rules.overlap
        assert left < min(chunks), "another chunk fits"


def test_a_document_below_min_length_is_no_chunk_either() -> None:
    cut = list(cut_by_lengths([(0, 8), (1, 9)], [6], Rules(6, min_length=9), losses := Losses()))
    assert cut == [(6, (1, 0, 6))] and losses.dropped["document shorter than a chunk"] == 8


@given(LENGTHS, RULES)
def test_best_fit_cuts_no_document_that_fits(lengths: list[int], rules: Rules) -> None:
    losses = Losses()
    packs = list(best_fit(enumerate(lengths), rules, losses))
    check_account(lengths, packs, losses)
    assert all(0 < total(each) <= rules.length for each in packs)
    for document, start, stop in (piece for each in packs for piece in each):
        if lengths[document] <= rules.length:
            assert (start, stop) == (0, lengths[document])
    assert all(start == 0 for each in packs for _, start, _ in each) or not rules.intact
    check_min_length(lengths, packs, rules)
    for earlier, later in combinations(packs, 2):
        assert total(earlier) + total(later[:1]) > rules.length, "a pack is opened for what fits nowhere"


def test_best_fit_puts_each_piece_where_least_room_is_left() -> None:
    packs = list(best_fit(enumerate([2, 5, 3, 6, 4]), Rules(10), Losses()))
    assert packs == [[(3, 0, 6), (4, 0, 4)], [(1, 0, 5), (2, 0, 3), (0, 0, 2)]]


@pytest.mark.parametrize(("make", "last"), [(concatenate, []), (best_fit, [[(0, 21, 25)]])])
def test_a_cut_document_goes_on_with_the_overlap_that_was_asked_for(make, last: list[Pack]) -> None:
    losses = Losses()
    packs = list(make([(0, 25)], Rules(10, min_length=4, overlap=3), losses))  # 4 tokens, of which 1 is new
    assert packs == [[(0, 0, 10)], [(0, 7, 17)], [(0, 14, 24)], *last]
    assert losses.repeated == 9


def test_an_overlap_longer_than_the_piece_before_begins_with_the_document() -> None:
    packs = list(concatenate([(0, 9), (1, 11)], Rules(10, overlap=3), losses := Losses()))
    assert packs == [[(0, 0, 9), (1, 0, 1)], [(1, 0, 10)]] and losses.repeated == 1 + 3


def test_best_fit_windows_change_neither_account_nor_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_WINDOW_DOCUMENTS", 3)
    lengths = [3, 9, 4, 25, 1, 1, 8]
    losses = Losses()
    packs = list(best_fit(enumerate(lengths), Rules(10), losses))
    check_account(lengths, packs, losses)
    assert sorted(piece[0] for each in packs for piece in each) == [0, 1, 2, 3, 3, 3, 4, 5, 6]


def test_documents_are_read_as_they_are_needed() -> None:
    def endless() -> Iterator[tuple[int, int]]:
        number = 0
        while True:
            yield number, 7
            number += 1

    assert next(concatenate(endless(), Rules(16), Losses())) == [(0, 0, 7), (1, 0, 7), (2, 0, 2)]
