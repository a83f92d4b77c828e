import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama3 import llama3_tokenizer
from packs import COLUMNS, write_packs
from rich.console import Console

from megatron_prolong.data.inspect import (
    DomainSurvey,
    LengthHistogram,
    domain_table,
    length_table,
    plot,
    preview,
    survey,
)
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.errors import UserError


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells_of(table: object) -> list[list[str]]:
    """The rows under the heading."""
    _, body = shown(table).split("─ \n")
    return [line.split() for line in body.splitlines() if line.strip()]


def test_numbers_are_never_cut_short() -> None:
    domain = DomainSurvey("thestackv1_concat_by_repo-524288", None, 12_345_678)
    domain.lengths.add(np.full(80_000, 2**19))
    for width in (80, 140):
        console = Console(file=io.StringIO(), width=width)
        console.print(domain_table([domain]))
        assert "41,943,040,000" in console.file.getvalue()  # type: ignore[attr-defined]


@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=50))
def test_histograms_count_every_document_once(lengths: list[int]) -> None:
    histogram = LengthHistogram()
    half = len(lengths) // 2
    for part in (lengths[:half], lengths[half:]):
        if part:
            histogram.add(np.array(part))
    for bucket in range(33):
        inside = [length for length in lengths if 2**bucket <= length < 2 ** (bucket + 1)]
        assert histogram.documents[bucket] == len(inside)
        assert histogram.tokens[bucket] == sum(inside)
        assert histogram.squares[bucket] == pytest.approx(sum(length**2 for length in inside))
    assert histogram.longest == max(lengths)


def two_domains(root: Path) -> Path:
    with MDSWriter(root / "mixed", COLUMNS) as writer:
        for domain, lengths in [("code", [8]), ("wiki", [1, 3, 4]), ("code", [8])]:
            ends = np.cumsum(lengths)
            writer.write(
                {
                    "input_ids": np.arange(8, dtype=np.uint32),
                    "indices": np.stack([ends - lengths, ends], axis=1).astype(np.uint32),
                    "domain": domain,
                    "length": 8,
                }
            )
    return root / "mixed"


def test_a_survey_by_domain(tmp_path: Path) -> None:
    code, wiki = survey(two_domains(tmp_path))
    assert (code.name, code.num_samples, code.num_documents, code.num_tokens) == ("code", 2, 2, 16)
    assert (wiki.name, wiki.num_samples, wiki.num_documents, wiki.num_tokens) == ("wiki", 1, 3, 8)
    assert code.num_targets is None
    rows = {cells[0]: cells[1:] for cells in cells_of(domain_table([code, wiki]))}
    assert rows["code"] == ["2", "2", "16", "66.7%", "8", "8", "all"]
    assert rows["wiki"] == ["1", "3", "8", "33.3%", "3", "4", "all"]
    # Attention: 64·2 of 64·2 + 1 + 9 + 16 = 154.
    assert cells_of(length_table([code, wiki])) == [
        ["1", "1", "4.2%", "0.6%", "0", "1"],
        ["2", "1", "12.5%", "5.8%", "0", "1"],
        ["4", "1", "16.7%", "10.4%", "0", "1"],
        ["8", "2", "66.7%", "83.1%", "2", "0"],
    ]
    assert "of attention   code   wiki" in shown(length_table([code, wiki]))
    assert [cells[4:] for cells in cells_of(length_table([code]))] == [[]], "of one domain it is told once"


def test_the_smallest_of_many_domains_are_counted_together(tmp_path: Path) -> None:
    """Packs of seven domains had a hundred rows, one for every combination, and as many columns."""
    with MDSWriter(tmp_path / "many", {**COLUMNS, "mask": "ndarray:uint8"}) as writer:
        for number in [*range(22), 21]:
            size = number + 1
            edges = np.array([0, size] if number != 2 else [0, 1, 2, 3], np.uint32)
            writer.write(
                {
                    "input_ids": np.zeros(size, np.uint32),
                    "indices": np.stack([edges[:-1], edges[1:]], axis=1),
                    "mask": np.ones(size, np.uint8),
                    "domain": f"d{number}",
                    "length": size,
                }
            )
    domains = survey(tmp_path / "many")
    assert [domain.name for domain in domains] == [
        *(f"d{number}" for number in range(21, 2, -1)),
        "(3 others)",
    ]
    assert (domains[0].num_samples, domains[0].num_targets) == (2, 44)
    (others,) = domains[-1:]
    assert (others.num_samples, others.num_documents, others.num_tokens, others.num_targets) == (3, 5, 6, 6)
    assert others.lengths.longest == 2 and others.lengths.squares.sum() == 8
    assert "d21" not in shown(length_table(domains)) and "d21" in shown(length_table(domains[:8]))


def test_targets_are_counted_where_there_is_a_mask(tmp_path: Path) -> None:
    (chats,) = survey(write_packs(tmp_path / "chat", [[[1, 2, 3, 4]]], masks=[[[0, 1, 0, 0]]]))
    assert chats.num_targets == 1
    assert "25.0%" in shown(domain_table([chats]))


def test_data_without_domain_or_indices_is_surveyed_too(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "raw", {"input_ids": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.arange(5, dtype=np.uint32)})
    (raw,) = survey(tmp_path / "raw")
    assert (raw.name, raw.num_documents, raw.num_tokens) == ("raw", 1, 5)


def test_the_plot_stacks_to_a_hundred_percent(tmp_path: Path) -> None:
    figure = plot(survey(two_domains(tmp_path)), "mixed")
    assert len(figure.axes) == 3 and figure.get_suptitle() == "mixed"
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["code", "wiki"]
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    figure.savefig(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000


def test_large_buckets_are_named_in_binary_units() -> None:
    lengths = LengthHistogram()
    lengths.add(np.array([1023, 1024, 65536, 2**20]))
    firsts = [cells[0] for cells in cells_of(length_table([DomainSurvey("d", None, 1, lengths)]))]
    assert firsts == ["512", "1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]


def test_a_preview_marks_boundaries_and_targets(tmp_path: Path) -> None:
    tokenizer = llama3_tokenizer()
    question, answer = (tokenizer.encode(text, add_special_tokens=False) for text in ("What? ", "Paris."))
    other = tokenizer.encode("alone", add_special_tokens=False)
    directory = write_packs(
        tmp_path / "chat",
        [[question + answer, other]],
        masks=[[[0] * len(question) + [1] * len(answer), [0] * len(other)]],
    )
    text = preview(directory, 0, tokenizer)
    total = len(question + answer + other)
    assert text.plain == (
        f"{directory}, shard shard.00000.mds, sample 0 · test · {total} tokens\n"
        f"\n── document 1 of 2 · {len(question + answer)} tokens ──\nWhat? ⟦Paris.⟧\n"
        f"\n── document 2 of 2 · {len(other)} tokens ──\nalone\n"
    )
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["⟦Paris.⟧"] == "green" and styles["What? "] == "dim" and styles["alone"] == "dim"


def test_a_preview_of_a_long_document_shows_its_two_ends(tmp_path: Path) -> None:
    tokenizer = llama3_tokenizer()
    tokens = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghij"]
    directory = write_packs(tmp_path / "d", [[tokens]])
    assert "ab\n… 6 tokens …\nij\n" in preview(directory, 0, tokenizer, max_tokens=4).plain
    assert "abcdefghij" in preview(directory, 0, tokenizer, max_tokens=10).plain


def test_what_cannot_be_inspected_is_refused(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "empty", COLUMNS):
        pass
    with pytest.raises(UserError, match="empty: no samples"):
        survey(tmp_path / "empty")
    with MDSWriter(tmp_path / "text", {"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match="no column input_ids, only text"):
        survey(tmp_path / "text")
    directory = write_packs(tmp_path / "d", [[[1]]])
    for index in (-1, 1):
        with pytest.raises(UserError, match=rf"no sample {index}; it has 1"):
            preview(directory, index, llama3_tokenizer())
