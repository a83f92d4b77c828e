"""Document-length distributions: they fill sequences, are reproducible and match the facts they cite."""

import numpy as np
import pytest

from megatron_prolong.plan.lengths import (
    LONG_TOKENS,
    PROLONG_64K,
    PROLONG_512K,
    PROLONG_SFT,
    BatchDocuments,
    DomainLengths,
    LengthMixture,
    single_document,
    squared_tokens,
)

MIXTURES = [PROLONG_64K, PROLONG_512K, PROLONG_SFT]


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: m.name)
def test_every_sequence_is_filled_with_positive_documents(mixture: LengthMixture) -> None:
    for lengths in mixture.batch(step=3, num_sequences=64):
        assert lengths.sum() == mixture.sequence_length
        assert lengths.min() >= 1


@pytest.mark.parametrize(
    ("domain", "longest"),
    [
        (DomainLengths("chats", 1.0, mean_tokens=1200, sigma=0.5, max_tokens=600), 600),
        (DomainLengths("words", 1.0, mean_tokens=1.4, sigma=0.01), 1),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_lengths_that_rounding_or_the_longest_make_smaller_fill_a_sequence_too(
    domain: DomainLengths, longest: int
) -> None:
    lengths = domain.draw(np.random.default_rng(0), 8192)
    assert (lengths.sum(), lengths.max()) == (8192, longest)


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    first, again = PROLONG_512K.batch(7, 16, seed=1), PROLONG_512K.batch(7, 16, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = PROLONG_512K.batch(8, 16, seed=1)
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: m.name)
def test_short_domains_have_the_mean_length_they_cite(mixture: LengthMixture) -> None:
    rng = np.random.default_rng(0)
    for domain in mixture.domains:
        if domain.document_tokens is None:
            documents = np.concatenate([domain.draw(rng, 2**22)[1:-1] for _ in range(4)])
            # About 1,000 documents at least, sigma ≤ 1.2: standard error of the mean < 6%.
            assert documents.mean() == pytest.approx(domain.mean_tokens, rel=0.15), domain.name


def test_a_sequence_begins_inside_a_document_more_likely_a_long_one() -> None:
    """A document with a random token in it is exp(sigma²) times as long as the mean, and half of it is left."""
    domain, rng = DomainLengths("short", 1.0, mean_tokens=100, sigma=0.5), np.random.default_rng(0)
    first = np.mean([domain.draw(rng, 4096)[0] for _ in range(4000)])
    assert first == pytest.approx(100 * np.exp(0.25) / 2, rel=0.05)


def test_long_documents_dominate_the_attention_cost() -> None:
    """What the module's docstring claims about the assumed sigmas."""
    for mixture, most in ((PROLONG_64K, 0.04), (PROLONG_512K, 0.02)):
        rng = np.random.default_rng(0)
        costs = {
            d.name: d.proportion
            * np.mean([squared_tokens(d.draw(rng, mixture.sequence_length)) for _ in range(20)])
            for d in mixture.domains
        }
        short = sum(costs[d.name] for d in mixture.domains if d.document_tokens is None)
        assert 0 < short / sum(costs.values()) < most


def test_documents_are_counted_once_each_be_they_long_or_short() -> None:
    batch = BatchDocuments.of([np.array([LONG_TOKENS - 1, 7]), np.array([LONG_TOKENS, LONG_TOKENS + 1])])
    assert batch.long.tolist() == [LONG_TOKENS, LONG_TOKENS + 1]
    assert (batch.short_tokens, batch.short_pairs) == (LONG_TOKENS - 1 + 7, (LONG_TOKENS - 1) ** 2 + 7**2)
    assert batch.pairs == sum(n**2 for n in (LONG_TOKENS - 1, 7, LONG_TOKENS, LONG_TOKENS + 1))


def test_a_512k_sequence_of_a_64k_domain_holds_eight_documents() -> None:
    books = next(d for d in PROLONG_512K.domains if d.name == "book-65536")
    assert books.draw(np.random.default_rng(0), 524_288).tolist() == [65_536] * 8


def test_a_document_longer_than_the_sequence_is_cut() -> None:
    domain = DomainLengths("long", 1.0, document_tokens=100)
    assert domain.draw(np.random.default_rng(0), 64).tolist() == [64]
    assert single_document(64).batch(0, 2)[0].tolist() == [64]
