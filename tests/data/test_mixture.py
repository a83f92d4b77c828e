import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import numbered_packs, record_tokenizer, write_packs

from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.mixture import Mixture, SampleRef, check_shards
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Stage

SIZES = {"code": 7, "books": 40, "wiki": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def write_sources(root: Path, first: int = 0) -> Path:
    """One sample to a shard; the first token of the first is `first`."""
    for number, (name, size) in enumerate(SIZES.items()):
        packs = numbered_packs(size, first=first + 1000 * number)
        write_packs(root / name, packs, size_limit=300, hashes=["xxh64"])
    return root


def mixture(root: Path, shares: dict[str, float] | None = None, **changes: object) -> Mixture:
    shares = shares or {"code": 0.3, "books": 0.6, "wiki": 0.1}
    settings = {"sequence_length": 8, "batch_sequences": 8, "seed": 42, "num_steps": 12} | changes
    return Mixture({root / name: share for name, share in shares.items()}, **settings)  # type: ignore[arg-type]


shares_of_three = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@settings(max_examples=60)
@given(shares=shares_of_three, batch=st.integers(1, 16), steps=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_proportions_hold_within_one_sample_after_every_step(
    sources: Path, shares: list[float], batch: int, steps: int, seed: int
) -> None:
    mixed = mixture(
        sources,
        dict(zip(SIZES, shares, strict=True)),
        batch_sequences=batch,
        num_steps=steps,
        seed=seed,
    )
    seen: Counter[int] = Counter()
    for step in range(steps):
        seen.update(ref.domain for ref in mixed.batch(step))
        for number, share in enumerate(shares):
            assert abs(seen[number] - share / sum(shares) * batch * (step + 1)) < 1
    assert [use.num_draws for use in mixed.usage()] == [seen[number] for number in range(3)]


@settings(max_examples=40)
@given(start=st.integers(0, 11), seed=st.integers(0, 1000))
def test_starting_at_any_step_equals_no_stop(sources: Path, start: int, seed: int) -> None:
    uninterrupted = mixture(sources, seed=seed)
    expected = [uninterrupted.batch(step) for step in range(12)]
    resumed = mixture(sources, seed=seed)
    assert [resumed.batch(step) for step in range(start, 12)] == expected[start:]
    assert [resumed.batch(step) for step in reversed(range(12))] == expected[::-1]


def test_nothing_is_seen_twice_before_all_is_seen_once(sources: Path) -> None:
    mixed = mixture(sources, batch_sequences=1, num_steps=480)
    for number, size in enumerate(SIZES.values()):
        draws = [ref.index for step in range(480) for ref in mixed.batch(step) if ref.domain == number]
        assert len(draws) > size
        for start in range(0, len(draws), size):
            epoch = draws[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))


def test_every_epoch_has_its_own_order(sources: Path) -> None:
    mixed = mixture(sources, {"books": 1.0}, batch_sequences=1, num_steps=200)
    indices = [mixed.batch(step)[0].index for step in range(200)]
    assert len({tuple(indices[start : start + 40]) for start in range(0, 200, 40)}) == 5


def test_the_seed_changes_the_stream_and_a_longer_run_does_not(sources: Path) -> None:
    one, other = mixture(sources).batch(0), mixture(sources, seed=43).batch(0)
    assert [ref.domain for ref in one] != [ref.domain for ref in other], "the order within the batch"
    assert set(one) != set(other), "the samples"
    first = [mixture(sources).batch(step) for step in range(12)]
    assert first == [mixture(sources, num_steps=500).batch(step) for step in range(12)]


def test_order_within_a_batch_is_shuffled(sources: Path) -> None:
    """Without it the domains would take turns, and every rank would always get the same ones."""
    mixed = mixture(sources, num_steps=40, batch_sequences=10)
    places = [[ref.domain for ref in mixed.batch(step)].index(2) for step in range(40)]
    assert len(set(places)) > 5


def test_reading_gives_the_sample_and_says_where_it_lies(sources: Path) -> None:
    mixed = mixture(sources)
    for ref in mixed.batch(3):
        packed = mixed.read(ref)
        assert packed.tokens[0] == 1000 * ref.domain + ref.index
        assert packed.document_lengths.tolist() == [4, 4]
        assert packed.identity.domain == str(sources / list(SIZES)[ref.domain])
        assert packed.identity.index == ref.index
    assert mixed.read(SampleRef(1, 39)).identity.shard == "shard.00039.mds"  # one to a shard


def test_usage_reports_how_often_a_domain_repeats(sources: Path) -> None:
    uses = {Path(use.name).name: use for use in mixture(sources, num_steps=10).usage()}
    assert uses["code"].num_draws == 24 and uses["code"].epochs == 24 / 7
    assert uses["wiki"].num_draws == 8 and uses["wiki"].epochs == 8
    assert uses["books"].num_draws == 48 and uses["books"].proportion == pytest.approx(0.6)


def test_the_summary_says_it_in_a_line(sources: Path) -> None:
    summary = mixture(sources, {"code": 3, "wiki": 1}, num_steps=10).summary()
    code, wiki = (f"{sources / name} " for name in ("code", "wiki"))
    assert summary.startswith(f"{code}75.0%, ") and f"; {wiki}25.0%, " in summary
    assert f"{20 / SIZES['wiki']:.3g} epochs (20 draws of {SIZES['wiki']} samples)" in summary


def test_the_fingerprint_is_that_of_the_stream(sources: Path, tmp_path: Path) -> None:
    base = mixture(sources).fingerprint()
    assert base == "f64dabfd40868b9b", "frozen: a run must resume after an upgrade"
    assert mixture(sources, {"code": 3, "books": 6, "wiki": 1}, num_steps=99).fingerprint() == base
    assert mixture(write_sources(tmp_path / "elsewhere")).fingerprint() == base
    write_packs(tmp_path / "grown" / "code", numbered_packs(8))
    grown = Mixture(
        {tmp_path / "grown" / "code": 0.3, sources / "books": 0.6, sources / "wiki": 0.1},
        sequence_length=8, batch_sequences=8, seed=42, num_steps=12,
    )  # fmt: skip
    same_sizes = write_sources(tmp_path / "same_sizes", first=1)
    others = [grown, mixture(same_sizes), mixture(sources, seed=1), mixture(sources, batch_sequences=4),
              mixture(sources, {"code": 0.4, "books": 0.5, "wiki": 0.1})]  # fmt: skip
    assert base not in {other.fingerprint() for other in others}


def test_the_stream_never_changes_between_releases(sources: Path) -> None:
    """Frozen values: the fingerprint says what the samples are, not how they are drawn."""
    drawn = [(ref.domain, ref.index) for ref in mixture(sources).batch(11)]
    assert drawn == [(0, 4), (0, 2), (1, 32), (1, 4), (1, 39), (1, 29), (0, 5), (1, 3)]
    alone = mixture(sources, {"books": 1.0}, batch_sequences=4)
    assert [(ref.domain, ref.index) for ref in alone.batch(1)] == [(0, 11), (0, 9), (0, 25), (0, 23)]


def test_a_stages_mixture_has_the_stages_seed_sizes_and_loss_mask(tmp_path: Path) -> None:
    write_packs(tmp_path / "d", numbered_packs(9), masks=[[[0, 0, 0, 0], [0, 1, 1, 1]]] * 9)
    fields = {"name": "s", "sequence_length": 8, "batch_tokens": 32, "steps": 3, "lr": 1, "seed": 5}
    stage = Stage(**fields, mixture={tmp_path / "d": 1.0}, loss_mask=True)  # type: ignore[arg-type]
    mixed = Mixture.of_stage(stage)
    expected = mixture(tmp_path, {"d": 1.0}, seed=5, batch_sequences=4, num_steps=3, loss_mask=True)
    assert [mixed.batch(step) for step in range(3)] == [expected.batch(step) for step in range(3)]
    assert mixed.fingerprint() == expected.fingerprint() and mixed.num_steps == 3
    mask = mixed.read(SampleRef(0, 0)).mask
    assert mask is not None and mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert Mixture.of_stage(stage.model_copy(update={"loss_mask": False})).read(SampleRef(0, 0)).mask is None
    with pytest.raises(UserError, match="not in the vocabulary of 3"):
        Mixture.of_stage(stage, vocab_size=3)


def test_shards_that_are_not_there_are_found_before_a_step_needs_them(tmp_path: Path) -> None:
    """As after a download that was stopped: opening a domain reads its first, middle and last sample only."""
    fields = {"name": "s", "sequence_length": 8, "batch_tokens": 32, "steps": 3, "lr": 1}
    for name, compression in (("books", None), ("code", "zstd"), ("wiki", None)):
        write_packs(tmp_path / name, numbered_packs(8), size_limit=300, compression=compression)
    shares = {tmp_path / "books": 0.5, tmp_path / "code": 0.25, tmp_path / "wiki": 0.25}
    stage = Stage(**fields, mixture=shares)  # type: ignore[arg-type]
    MDSReader(tmp_path / "code")[3]  # unpacked, so that its compressed file may go
    (tmp_path / "code/shard.00003.mds.zstd").unlink()
    assert check_shards([stage, stage.model_copy(update={"mixture": "mock"})]) == []
    (tmp_path / "books/shard.00001.mds").unlink()
    (tmp_path / "books/shard.00002.mds").write_bytes(b"the beginning of a")
    (tmp_path / "code/shard.00006.mds.zstd").unlink()
    Mixture.of_stage(stage)
    with pytest.raises(UserError) as caught:
        check_shards([stage, stage])
    title, books, code = str(caught.value).splitlines()
    assert title == "data is not there as a whole; fetch or write it again:"
    assert "books: 2 of its 8 shards are missing" in books and "such as" in books
    assert "code: 1 of its 8 shards" in code and code.endswith("/code/shard.00006.mds.zstd")


def test_shards_that_every_rank_would_unpack_are_warned_of(small_disk: Path) -> None:
    """A whole shard, a tenth of a second, for each of the 64 sequences of a step."""
    directory = write_packs(small_disk / "d", numbered_packs(8), size_limit=300, compression="zstd")
    fields = {"name": "s", "sequence_length": 8, "batch_tokens": 32, "steps": 3, "lr": 1}
    stage = Stage(**fields, mixture={directory: 1.0})  # type: ignore[arg-type]
    assert check_shards([stage]) == []
    MDSReader(directory)[0]  # one is unpacked, the others are not
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (warning,) = check_shards([stage])
    assert warning.startswith(
        f"{directory}: its shards are compressed and nothing may be written beside them"
    )
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    list(MDSReader(directory))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert check_shards([stage]) == [], "unpacked before"


def test_mock_is_random_tokens() -> None:
    mock = Mixture("mock", sequence_length=16, batch_sequences=2, seed=1, num_steps=3, vocab_size=50)
    packs = [mock.read(ref).tokens for step in range(3) for ref in mock.batch(step)]
    assert all(tokens.max() < 50 and len(tokens) == 16 for tokens in packs)
    assert len({tokens.tobytes() for tokens in packs}) == 6
    again = mock.read(mock.batch(0)[0]).tokens
    assert np.array_equal(again, packs[0])
    other = Mixture("mock", sequence_length=16, batch_sequences=2, seed=2, num_steps=3, vocab_size=50)
    assert other.read(other.batch(0)[0]).tokens.tobytes() not in {tokens.tobytes() for tokens in packs}


def test_every_domain_that_cannot_be_used_is_named(tmp_path: Path, sources: Path) -> None:
    with MDSWriter(tmp_path / "empty", {"input_ids": "ndarray:uint32"}):
        pass
    with MDSWriter(tmp_path / "text", {"text": "str"}) as writer:
        writer.write({"text": "not tokenized"})
    write_packs(tmp_path / "long", numbered_packs(1, sequence_length=16))
    write_packs(tmp_path / "short", [[[1, 2], [3, 4]]] * 9)
    write_packs(tmp_path / "other_tokenizer", [[[1, 2, 99_999, 4, 5, 6, 7, 8]]])
    with pytest.raises(UserError) as error:
        Mixture(
            {
                tmp_path / "absent": 1,
                tmp_path / "empty": 1,
                tmp_path / "text": 1,
                tmp_path / "long": 1,
                tmp_path / "short": 1,
                tmp_path / "other_tokenizer": 1,
                sources / "code": 1,
            },
            sequence_length=8, batch_sequences=4, seed=0, num_steps=1, vocab_size=50_000,
        )  # fmt: skip
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and lines[0] == "the mixture cannot be read:"
    for line, (name, said) in zip(
        lines[1:],
        [
            ("absent", "no such directory"),
            ("empty", "no samples"),
            ("text", "no column input_ids, only text; tokenize it first"),
            ("long", "sample 0: 16 tokens, but the stage's sequence_length is 8"),
            ("short", "4 tokens, not even half of the stage's sequence_length 8"),
            ("other_tokenizer", "token 99999 at position 2 is not in the vocabulary of 50000"),
        ],
        strict=True,
    ):
        assert name in line and said in line
    with pytest.raises(UserError, match="it names no directory"):
        Mixture({}, sequence_length=8, batch_sequences=4, seed=0, num_steps=1)


def test_domains_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    record_tokenizer(sources / "books", "a" * 16)
    shares = {"code": 0.5, "books": 0.3, "wiki": 0.2}
    assert mixture(sources, shares).tokenizer == "a" * 16
    record_tokenizer(sources / "wiki", "b" * 16)
    with pytest.raises(
        UserError, match=r"books and .*wiki are of different tokenizers \(fingerprints a+ and b+\)"
    ):
        mixture(sources, shares)


def test_a_later_bad_sample_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_packs(tmp_path / "d", [*numbered_packs(3), [[7] * 9], *numbered_packs(4)])
    mixed = mixture(tmp_path, {"d": 1.0}, vocab_size=1000)
    assert mixed.read(SampleRef(0, 2)).num_tokens == 8
    with pytest.raises(UserError, match=r"d, shard shard\.00000\.mds, sample 3: 9 tokens"):
        mixed.read(SampleRef(0, 3))


def test_packs_a_little_shorter_than_the_stage_are_taken(tmp_path: Path) -> None:
    write_packs(tmp_path / "d", [[[1, 2, 3]], *numbered_packs(2), [[7]]])
    assert mixture(tmp_path, {"d": 1.0}).read(SampleRef(0, 3)).num_tokens == 1


def test_a_stage_with_loss_mask_needs_the_column(tmp_path: Path, sources: Path) -> None:
    with pytest.raises(UserError, match=r"code, shard shard\.00000\.mds, sample 0: no column mask"):
        mixture(sources, {"code": 1.0}, loss_mask=True)
    write_packs(tmp_path / "chat", [[[1, 2, 3, 4, 5]]], masks=[[[0, 0, 0, 1, 1]]])
    masked = mixture(tmp_path, {"chat": 1.0}, loss_mask=True).read(SampleRef(0, 0))
    assert masked.mask is not None and masked.mask.tolist() == [0, 0, 0, 1, 1]


def test_beyond_the_run_there_is_no_batch(sources: Path) -> None:
    for step in (-1, 12):
        with pytest.raises(IndexError):
            mixture(sources).batch(step)
