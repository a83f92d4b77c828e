"""How long the documents are: ProLong's mixtures as reproducible length distributions.

Attention costs Σ len² over documents, so time, volume of the exchange and balance all follow from the lengths
of the documents inside a packed sequence, never from its tokens alone. Without the real shards the lengths
are drawn here; the draw is a pure function of (mixture, seed, step).

What is known, and from where:
- Proportions and sequence lengths: ProLong's train_64K.sh and train_512K.sh (princeton-nlp/ProLong 907dcf4).
- Long domains (`*-65536`, `*-524288`): one document fills its length; a 512K sequence of a 64K domain holds
  eight (paper A.2; datatools' `--split_by_lengths`). Textbooks are concatenated by subject: one document per
  sequence.
- Short domains: shuffled documents, concatenated and cut at the sequence's end, the cut-off part opening the
  next sequence (paper A.2). Mean tokens per document from the data sets' own cards (see `_SHORT`).
- UltraChat (SFT): 1.2K tokens on average, 4.1K at most (paper).

What is assumed: short documents are log-normal with the stated sigma. That is harmless: they are a third of
the tokens but under 4% of Σ len² at 64K and under 2% at 512K (tests/plan/test_lengths.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class DomainLengths:
    """Document lengths of one domain of a mixture.

    Attributes:
        name: the domain's directory name in ProLong's released data.
        proportion: share of the mixture's sequences.
        document_tokens: set when every document has exactly this many tokens.
        mean_tokens: else the mean of the log-normal length.
        sigma: standard deviation of the logarithm of the length.
        max_tokens: longest document; longer draws are clipped.
    """

    name: str
    proportion: float
    document_tokens: int | None = None
    mean_tokens: float = 0.0
    sigma: float = 1.0
    max_tokens: int | None = None

    def draw(self, rng: np.random.Generator, sequence_length: int) -> Lengths:
        """The document lengths of one packed sequence: int64 [D], summing to `sequence_length`."""
        if self.document_tokens is not None:
            length = min(self.document_tokens, sequence_length)
            lengths = np.full(-(-sequence_length // length), length, dtype=np.int64)
        else:
            lengths = self._draw_short(rng, sequence_length)
        return _cut(lengths, sequence_length)

    def _draw_short(self, rng: np.random.Generator, sequence_length: int) -> Lengths:
        """Enough log-normal lengths to fill a sequence that starts inside a document.

        A sequence starts at a uniformly random token of the stream, so its first document is drawn by size
        (a document with probability proportional to its length) and a uniform part of it is left.
        """
        mu = np.log(self.mean_tokens) - self.sigma**2 / 2  # mean of a log-normal is exp(mu + sigma²/2)
        parts = [self._whole_tokens(rng.lognormal(mu + self.sigma**2, self.sigma, 1) * rng.random())]
        while (missing := sequence_length - sum(int(part.sum()) for part in parts)) > 0:
            count = int(missing / self.mean_tokens * 1.2) + 8
            parts.append(self._whole_tokens(rng.lognormal(mu, self.sigma, count)))
        return np.concatenate(parts)

    def _whole_tokens(self, lengths: NDArray[np.float64]) -> Lengths:
        return np.clip(lengths.round().astype(np.int64), 1, self.max_tokens)


@dataclass(frozen=True)
class LengthMixture:
    """The document lengths of a stage's packed sequences.

    Attributes:
        name: for messages and reports.
        sequence_length: tokens of a packed sequence.
        domains: what the sequences are drawn from; proportions sum to 1.
    """

    name: str
    sequence_length: int
    domains: tuple[DomainLengths, ...]

    def __post_init__(self) -> None:
        assert abs(sum(domain.proportion for domain in self.domains) - 1) < 1e-6

    def batch(self, step: int, num_sequences: int, seed: int = 42) -> list[Lengths]:
        """The document lengths of each packed sequence of a global batch; pure in its arguments.

        Returns:
            `num_sequences` int64 arrays [D], each summing to `sequence_length`.
        """
        rng = np.random.default_rng([seed, step])
        proportions = np.array([domain.proportion for domain in self.domains])
        chosen = rng.choice(len(self.domains), size=num_sequences, p=proportions / proportions.sum())
        return [self.domains[index].draw(rng, self.sequence_length) for index in chosen]


# Shorter documents are counted together: no rank waits for one of them.
LONG_TOKENS = 4096


@dataclass(frozen=True)
class BatchDocuments:
    """The documents of one global batch, as far as time depends on them.

    Attributes:
        long: tokens of each document of at least LONG_TOKENS, int64 [D].
        short_tokens, short_pairs: Σ len and Σ len² of the others.
    """

    long: Lengths
    short_tokens: int
    short_pairs: int

    @classmethod
    def of(cls, sequences: Sequence[Lengths]) -> BatchDocuments:
        """From the document lengths of each packed sequence."""
        lengths = np.concatenate(list(sequences))
        short = lengths[lengths < LONG_TOKENS]
        return cls(lengths[lengths >= LONG_TOKENS], int(short.sum()), squared_tokens(short))

    @property
    def pairs(self) -> int:
        """Σ len² of the batch."""
        return squared_tokens(self.long) + self.short_pairs


def squared_tokens(lengths: Lengths) -> int:
    """Σ len² of a packed sequence, in tokens²: what causal attention costs, up to a factor."""
    return int(np.dot(lengths, lengths))


def single_document(sequence_length: int) -> LengthMixture:
    """Every packed sequence is one document: the dearest mixture there is."""
    document = DomainLengths("one document", 1.0, document_tokens=sequence_length)
    return LengthMixture("one document per sequence", sequence_length, (document,))


def _cut(lengths: Lengths, total: int) -> Lengths:
    """The documents up to `total` tokens, the last one shortened."""
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, total)) + 1
    cut = lengths[:count].copy()
    cut[-1] -= ends[count - 1] - total
    return cut


def _long(name: str, proportion: float, tokens: int) -> DomainLengths:
    return DomainLengths(name, proportion, document_tokens=tokens)


# Mean tokens per document = tokens / documents as the source states them (GPT-2-like tokenizers; Llama-3's
# counts are within some 10%). Sigma: 1.0 is a mean 1.65 times the median.
_SHORT = (
    DomainLengths("fineweb-edu", 0.10, mean_tokens=1034),  # 10B tokens / 9.67M rows of sample-10BT
    DomainLengths("fineweb-2023-50", 0.10, mean_tokens=672),  # 10B / 14.9M rows of sample-10BT
    DomainLengths("stackexchange", 0.04, mean_tokens=669, sigma=0.8),  # Dolma 1.7 card: 19.6B / 29.3M
    DomainLengths("dolmawiki", 0.04, mean_tokens=600, sigma=1.2),  # Dolma 1.7 card: 3.7B / 6.2M
    DomainLengths("tuluv2", 0.03, mean_tokens=900, sigma=1.0),  # assumed: chats of a few turns
    DomainLengths("arxiv", 0.03, mean_tokens=18_000, sigma=0.8),  # Dolma 1.7 card: 28.0B / 1.55M
    DomainLengths("openwebmath", 0.03, mean_tokens=2_333, sigma=1.2),  # arXiv 2310.06786: 14.7B / 6.3M
)

PROLONG_64K = LengthMixture(
    "ProLong 64K",
    65_536,
    (
        _long("thestackv1_concat_by_repo-65536", 0.30, 65_536),
        _long("book-65536", 0.30, 65_536),
        _long("textbooks", 0.03, 65_536),
        *_SHORT,
    ),
)

PROLONG_512K = LengthMixture(
    "ProLong 512K",
    524_288,
    (
        _long("thestackv1_concat_by_repo-524288", 0.15, 524_288),
        _long("thestackv1_concat_by_repo-65536", 0.15, 65_536),
        _long("book-524288", 0.05, 524_288),
        _long("book-65536", 0.25, 65_536),
        _long("textbooks", 0.03, 524_288),
        *_SHORT,
    ),
)

PROLONG_SFT = LengthMixture(
    "ProLong SFT (UltraChat)",
    65_536,
    (DomainLengths("prolong-ultrachat-64K", 1.0, mean_tokens=1_200, sigma=0.5, max_tokens=4_100),),
)
