"""Where a stage's document lengths come from: real shards, published distributions, names, or the worst case."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.plan.batches import stage_batches
from megatron_prolong.recipe.schema import Stage


def stage(mixture: object, length: int = 65_536, sequences: int = 32) -> Stage:
    return Stage.model_validate(
        {"name": "s", "sequence_length": length, "batch_tokens": length * sequences, "steps": 9, "lr": 1e-5,
         "mixture": mixture}
    )  # fmt: skip


def shards(directory: Path, packs: list[list[int]]) -> Path:
    with MDSWriter(directory, {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32"}) as writer:
        for lengths in packs:
            ends = np.cumsum(lengths)
            spans = np.stack([ends - lengths, ends], axis=1).astype(np.uint32)
            writer.write({"input_ids": np.arange(ends[-1], dtype=np.uint32), "indices": spans})
    return directory


def test_real_shards_give_the_batches_that_training_will_see(tmp_path: Path) -> None:
    long, short = (
        shards(tmp_path / "long", [[64]] * 5),
        shards(tmp_path / "short", [[1, 63], [20, 20, 24], [60, 4]]),
    )
    one = stage({str(long): 0.5, str(short): 0.5}, length=64, sequences=4)
    found = stage_batches(one, 3)
    assert "own shards" in found.source
    mixture = Mixture(one.mixture, sequence_length=64, batch_sequences=4, seed=one.seed, num_steps=9)
    for step, lengths in enumerate(found.lengths):
        expected = [mixture.read(ref).document_lengths.tolist() for ref in mixture.batch(step)]
        assert [pack.tolist() for pack in lengths] == expected
    assert found.documents[0].short_tokens == 4 * 64
    half = stage({str(long): 0.5, str(tmp_path / "not here yet"): 0.5}, length=64, sequences=4)
    assert "no shards here" in stage_batches(half, 1).source


def test_published_domains_are_known_by_name(tmp_path: Path) -> None:
    found = stage_batches(stage({"data/book-65536": 0.5, "data/fineweb-edu": 0.5}), 8)
    assert "published document lengths (no shards here)" in found.source and "assumed" not in found.source
    packs = [pack for step in found.lengths for pack in step]
    assert sum(len(pack) == 1 for pack in packs) == len(packs) // 2
    assert np.mean([len(pack) for pack in packs if len(pack) > 1]) == pytest.approx(65_536 / 1034, rel=0.15)


def test_published_lengths_are_those_of_the_sequence_length_and_other_at_every_step() -> None:
    (textbooks,) = stage_batches(stage({"data/textbooks": 1.0}, length=524_288, sequences=1), 1).lengths[0]
    assert textbooks.tolist() == [524_288], "at 64K they are cut to 65,536"
    first, second = stage_batches(stage({"data/fineweb-edu": 1.0}, sequences=1), 2).lengths
    assert first[0].tolist() != second[0].tolist()


def test_a_name_may_say_the_length_and_the_unknown_is_assumed_dearest() -> None:
    found = stage_batches(stage({"data/novels-8192": 0.5, "data/novels": 0.5}, sequences=1), 2)
    lengths = {tuple(pack.tolist()) for step in found.lengths for pack in step}
    assert lengths == {(8192,) * 8, (65_536,)}
    assert "one document per sequence assumed for novels" in found.source
    assert "assumed for part-000" in stage_batches(stage({"data/part-000": 1.0}), 1).source
    assert "mock" in stage_batches(stage("mock"), 1).source


def test_never_more_steps_than_the_stage_has() -> None:
    assert len(stage_batches(stage("mock"), 64).lengths) == 9


def test_planning_and_reporting_need_no_torch() -> None:
    modules = "megatron_prolong.plan.report, megatron_prolong.plan.page, megatron_prolong.report.page"
    code = f"import sys, {modules}; print(sorted({{'torch', 'megatron', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
