"""What a data set holds: documents, tokens and attention cost by length and domain; samples as text.

Lengths are counted in buckets of powers of two, so the memory does not grow with the data. Attention costs
the sum of squared document lengths: with document masks a few long documents are most of it, which is
why the table gives every bucket's share of that beside its share of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSReader
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.data.packed import Identity, PackedSequence, Piece, open_tokens, read_boundaries
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.runtime.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

MOST_DOMAINS = 20
"""Of a survey. Packs of several domains have a name for every combination: of seven, a hundred."""
_MOST_COLUMNS = 8
NUM_BUCKETS = 33  # bucket b holds lengths of [2**b, 2**(b+1)); MDS arrays are below 2**32


@dataclass
class LengthHistogram:
    """Documents by length; float64 where sums of squares would overflow."""

    documents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BUCKETS, np.int64))
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BUCKETS, np.int64))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BUCKETS, np.float64))
    longest: int = 0

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count documents of these lengths, int64 [D], all above 0."""
        buckets = np.frexp(lengths)[1] - 1
        self.documents += np.bincount(buckets, minlength=NUM_BUCKETS)
        np.add.at(self.tokens, buckets, lengths)
        np.add.at(self.squares, buckets, lengths.astype(np.float64) ** 2)
        self.longest = max(self.longest, int(lengths.max()))

    def __iadd__(self, other: LengthHistogram) -> Self:
        self.documents += other.documents
        self.tokens += other.tokens
        self.squares += other.squares
        self.longest = max(self.longest, other.longest)
        return self


@dataclass
class DomainSurvey:
    """One domain of a data set. num_targets: tokens whose mask is not 0, None when there is no mask."""

    name: str
    num_targets: int | None
    num_samples: int = 0
    lengths: LengthHistogram = field(default_factory=LengthHistogram)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.tokens.sum())

    @property
    def num_documents(self) -> int:
        return int(self.lengths.documents.sum())


def survey(directory: Path) -> list[DomainSurvey]:
    """Count a data set, by its `domain` column (the directory's name without one), largest domain first.

    Where there are more than MOST_DOMAINS, the smallest are counted together as the last.

    Raises UserError for data without tokens, without samples, or with a sample that is wrong.
    """
    reader = open_tokens(directory, "mask", "domain")
    if not len(reader):
        raise UserError(f"{directory}: no samples")
    has_mask = "mask" in reader.columns
    domains: dict[str, DomainSurvey] = {}
    for number in track(range(len(reader)), len(reader), f"{directory}: samples"):
        sample = reader[number]
        name = _domain_of(reader, sample)
        domain = domains.setdefault(name, DomainSurvey(name, num_targets=0 if has_mask else None))
        domain.num_samples += 1
        # Without a mask no token is touched: a data set larger than memory is counted from its boundaries.
        edges = read_boundaries(sample.get("indices"), len(sample["input_ids"]), Identity.of(reader, number))
        domain.lengths.add(np.diff(edges))
        if domain.num_targets is not None:
            domain.num_targets += int(np.count_nonzero(sample["mask"]))
    largest_first = sorted(domains.values(), key=lambda domain: -domain.num_tokens)
    if len(domains) <= MOST_DOMAINS:
        return largest_first
    return [*largest_first[: MOST_DOMAINS - 1], _together(largest_first[MOST_DOMAINS - 1 :])]


def _together(domains: list[DomainSurvey]) -> DomainSurvey:
    first, *others = domains
    first.name = f"({len(domains)} others)"
    for other in others:
        first.num_samples += other.num_samples
        first.lengths += other.lengths
        if first.num_targets is not None:
            first.num_targets += other.num_targets or 0
    return first


def _domain_of(reader: MDSReader, sample: Mapping[str, Any]) -> str:
    return str(sample.get("domain", reader.path.name))


def domain_table(domains: list[DomainSurvey]) -> Table:
    """Samples, documents, tokens and lengths of every domain."""
    table = _table("Domains")
    table.add_column("domain", overflow="fold")
    for heading in ("samples", "documents", "tokens", "share", "mean", "longest", "targets"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = sum(domain.num_tokens for domain in domains)
    for domain in domains:
        targets = domain.num_targets
        table.add_row(
            domain.name,
            f"{domain.num_samples:,}",
            f"{domain.num_documents:,}",
            f"{domain.num_tokens:,}",
            f"{domain.num_tokens / total:.1%}",
            f"{domain.num_tokens / domain.num_documents:,.0f}",
            f"{domain.lengths.longest:,}",
            "all" if targets is None else f"{targets / domain.num_tokens:.1%}",
        )
    return table


def length_table(domains: list[DomainSurvey]) -> Table:
    """Documents, share of tokens and share of attention cost of every bucket of lengths; each domain's documents
    where there are a few."""
    columns = domains if 1 < len(domains) <= _MOST_COLUMNS else []
    table = _table("Document lengths")
    for heading in ("from", "documents", "of tokens", "of attention"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in columns:
        table.add_column(domain.name, justify="right", overflow="fold")
    documents, tokens, squares = (
        np.sum([getattr(domain.lengths, what) for domain in domains], axis=0)
        for what in ("documents", "tokens", "squares")
    )
    for bucket in _used_buckets(domains):
        table.add_row(
            format_count(1 << bucket),
            f"{documents[bucket]:,}",
            f"{tokens[bucket] / tokens.sum():.1%}",
            f"{squares[bucket] / squares.sum():.1%}",
            *(f"{domain.lengths.documents[bucket]:,}" for domain in columns),
        )
    return table


def usage_table(mixture: Mixture, stage: str) -> Table:
    """What a stage draws from every domain of its mixture, and how often each sample is seen (epochs)."""
    from rich.text import Text

    table = _table(f"Stage {stage}: {mixture.num_steps:,} steps of {mixture.batch_sequences:,} sequences")
    table.add_column("domain", overflow="fold")
    for heading in ("share", "samples", "draws", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for use in mixture.usage():
        epochs = Text(f"{use.epochs:.2f}", "yellow" if use.epochs > 1 else "")
        table.add_row(use.name, f"{use.proportion:.1%}", f"{use.num_samples:,}", f"{use.num_draws:,}", epochs)
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _used_buckets(domains: list[DomainSurvey]) -> range:
    used = np.flatnonzero(np.sum([domain.lengths.documents for domain in domains], axis=0))
    return range(int(used[0]), int(used[-1]) + 1)


def plot(domains: list[DomainSurvey], title: str) -> Figure:
    """Shares of documents, tokens and attention cost by the length of the document, domains stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    buckets = _used_buckets(domains)
    for axes, (what, label) in zip(
        figure.subplots(1, 3),
        {"documents": "documents", "tokens": "tokens", "squares": "attention cost"}.items(),
        strict=True,
    ):
        values = np.array([getattr(domain.lengths, what)[buckets.start : buckets.stop] for domain in domains])
        percent = 100 * values / values.sum()
        bottom = np.zeros(len(buckets))
        for domain, heights in zip(domains, percent, strict=True):
            axes.bar(range(len(buckets)), heights, bottom=bottom, label=domain.name, width=0.9)
            bottom += heights
        axes.set_xticks(range(len(buckets)), [format_count(1 << bucket) for bucket in buckets], rotation=60)
        axes.set(xlabel="tokens of the document, from", ylabel=f"% of {label}")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    figure.suptitle(title)
    return figure


def preview(
    directory: Path, index: int, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 200
) -> Text:
    """Sample `index` as text, every document under a line with its number and length.

    max_tokens: of each document, from its beginning and its end. With a mask, targets are green between
    ⟦ and ⟧ and the rest is dim. Raises UserError when there is no such sample.
    """
    from rich.text import Text

    reader = open_tokens(directory, "mask", "domain")
    if not 0 <= index < len(reader):
        raise UserError(f"{directory}: no sample {index}; it has {len(reader)}, counted from 0")
    sample = reader[index]
    sequence = PackedSequence.from_sample(sample, Identity.of(reader, index), loss_mask="mask" in sample)
    title = f"{sequence.identity} · {_domain_of(reader, sample)} · {sequence.num_tokens:,} tokens"
    text = Text(f"{title}\n", style="bold")
    for number, piece in enumerate(sequence.pieces(), start=1):
        count = len(piece.tokens)
        text.append(
            f"\n── document {number} of {sequence.num_documents} · {count:,} tokens ──\n", style="bold cyan"
        )
        if count <= max_tokens:
            text.append_text(_decoded(piece, tokenizer))
        else:
            half = max_tokens // 2
            text.append_text(_decoded(_part(piece, slice(0, half)), tokenizer))
            text.append(f"\n… {count - 2 * half:,} tokens …\n", style="cyan")
            text.append_text(_decoded(_part(piece, slice(count - half, count)), tokenizer))
        text.append("\n")
    return text


def _part(piece: Piece, span: slice) -> Piece:
    return Piece(piece.tokens[span], None if piece.mask is None else piece.mask[span])


def _decoded(piece: Piece, tokenizer: Any) -> Text:
    from rich.text import Text

    text = Text()
    if piece.mask is None:
        return text.append(tokenizer.decode(piece.tokens.tolist()))
    edges = np.flatnonzero(np.diff(piece.mask)) + 1
    for tokens, mask in zip(np.split(piece.tokens, edges), np.split(piece.mask, edges), strict=True):
        decoded = tokenizer.decode(tokens.tolist())
        text.append(f"⟦{decoded}⟧" if mask[0] else decoded, style="green" if mask[0] else "dim")
    return text
