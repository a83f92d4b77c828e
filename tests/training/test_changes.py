"""What may change between two starts of a run: told, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prolong.convert import manifest
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.runtime.packages import version_of
from megatron_prolong.training import prepare
from megatron_prolong.training.changes import refuse_changes, refuse_gaps, refuse_other_work, work_of
from megatron_prolong.training.prepare import refuse_precision
from megatron_prolong.training.run_directory import Checkpoint, StageStatus

MIXTURE = {"books": 0.75, "code": 0.25}
STEPS = {"first": 10, "second": 4, "third": 0}  # done, in progress, waiting


def recipe(stages: dict[str, dict[str, Any]] | None = None, order=tuple(STEPS), **fields: Any) -> Recipe:
    """Three stages of ten steps, with what `stages` and `fields` set differently."""
    common = {"sequence_length": 64, "batch_tokens": 128, "steps": 10, "lr": 1e-3, "mixture": MIXTURE}
    return Recipe.model_validate(
        {
            "name": "r", "run_dir": "/run", "model": {"path": "somewhere"},
            "stages": [{"name": name, **common, **(stages or {}).get(name, {})} for name in order],
            **fields,
        }
    )  # fmt: skip


def statuses(of: Recipe, steps: dict[str, int] = STEPS) -> list[StageStatus]:
    return [
        StageStatus(
            stage, Checkpoint(Path("saved"), {"step": steps[stage.name]}) if steps[stage.name] else None
        )
        for stage in of.stages
    ]


def told(now: Recipe) -> list[str]:
    return refuse_changes(recipe(), now, statuses(now))


FIXED = {
    "sequence_length": 32, "rope_base": 1e5, "yarn": {"factor": 8, "original_length": 32}, "batch_tokens": 64,
    "steps": 5, "warmup": 0.5, "schedule": "linear", "seed": 7,
    "carry": {"weights": False, "optimizer": False}, "loss_mask": True, "precision": "fp32",
    "mixture": {"books": 0.5, "code": 0.5},
}  # fmt: skip
FREE = {
    "lr": 2e-3, "min_lr_ratio": 0.0, "micro_batch_tokens": 128, "layout": {"tp": 2}, "recompute": "full",
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*FIXED.items(), *FREE.items()])
def test_a_stage_that_is_done_stays_one_that_waits_is_free_and_one_in_progress_keeps_its_numbers(key, value):
    assert told(recipe({"third": {key: value}})) == []
    with pytest.raises(UserError, match=rf"- stage\.first\.{key}.* → .* \(the stage is at step 10\)"):
        told(recipe({"first": {key: value}}))
    if key in FREE:
        assert told(recipe({"second": {key: value}}))[0].startswith(f"stage.second.{key}")
    else:
        with pytest.raises(UserError, match=rf"- stage\.second\.{key}.* \(the stage is at step 4\)"):
            told(recipe({"second": {key: value}}))


def test_steps_to_come_may_be_passed_over_and_those_made_are_what_they_are():
    assert told(recipe({"second": {"skip_steps": [5, "7-8"]}})) == ["stage.second.skip_steps: None → 5, 7-8"]
    for given, shown in {"4 - 5": "4-5", "1": "1"}.items():
        with pytest.raises(
            UserError, match=rf"second\.skip_steps: None → {shown} \(the stage is at step 4\)"
        ):
            told(recipe({"second": {"skip_steps": given}}))
    with pytest.raises(UserError, match=r"first\.skip_steps: None → 10 \(the stage is at step 10\)"):
        told(recipe({"first": {"skip_steps": 10}}))


def test_data_may_move():
    moved = {"moved/books": 0.75, "moved/code": 0.25}
    assert len(told(recipe({"first": {"mixture": moved}, "second": {"mixture": moved}}))) == 8


def test_a_budget_in_tokens_is_as_fixed_as_one_in_steps():
    now = recipe({"second": {"steps": None, "tokens": 2560}})
    with pytest.raises(UserError, match=r"stage\.second\.tokens: None → 2560 \(the stage is at step 4\)"):
        told(now)


def test_the_model_is_fixed_for_the_whole_run():
    with pytest.raises(UserError, match=r"somewhere → elsewhere \(fixed for the whole run\)"):
        told(recipe(model={"path": "elsewhere"}))


def test_the_precision_of_the_recipe_is_fixed_for_stages_that_have_begun_without_one_of_their_own():
    """As if each stage had it: what waits is free, and what has begun may be given what it had."""
    now = recipe(precision="fp32")
    waiting = dict.fromkeys(STEPS, 0)
    assert refuse_changes(recipe(), now, statuses(now, waiting)) == ["precision: bf16 → fp32"]
    with pytest.raises(UserError) as refused:
        told(now)
    assert str(refused.value).splitlines()[1:] == [
        "  - stage.first.precision: bf16 → fp32 (the stage is at step 10)",
        "  - stage.second.precision: bf16 → fp32 (the stage is at step 4)",
    ]
    kept = {name: {"precision": "bf16"} for name in ("first", "second")}
    assert told(recipe(kept, precision="fp32")) == ["precision: bf16 → fp32"]


def test_the_scales_of_fp8_are_fixed_where_a_stage_is_in_fp8():
    before, now = (
        recipe({"second": {"precision": "fp8"}}, fp8_recipe=name) for name in ("tensorwise", "delayed")
    )
    with pytest.raises(UserError) as refused:
        refuse_changes(before, now, statuses(now))
    assert str(refused.value).splitlines()[1:] == [
        "  - stage.second.precision: fp8 (tensorwise) → fp8 (delayed) (the stage is at step 4)"
    ]


def test_what_names_the_run_is_no_change_and_other_settings_are_told():
    assert told(recipe(name="other", run_dir="/moved")) == []
    assert told(recipe(optimizer={"clip": 0.5})) == ["optimizer.clip: 1.0 → 0.5"]


def test_stages_that_have_begun_keep_their_order():
    assert told(recipe(order=("first", "third", "second"))) == []
    with pytest.raises(UserError, match=r"order of the stages: .* → .* \(they have begun\)"):
        told(recipe(order=("second", "first", "third")))


def test_a_stage_may_leave_before_it_has_begun(tmp_path):
    now = recipe(order=("first", "second"), run_dir=tmp_path)
    assert told(now) == ["stage third: removed"]


def test_a_stage_that_comes_back_is_compared_with_the_recipe_it_was_trained_by(tmp_path):
    """Nothing else tells what it was trained with."""
    now = recipe(run_dir=tmp_path)
    without = recipe(order=("first", "third"), run_dir=tmp_path)
    with pytest.raises(UserError) as refused:
        refuse_changes(without, now, statuses(now))
    (said,) = str(refused.value).splitlines()[1:]
    assert said.startswith("  - stage second: added (it is at step 4, of a recipe that ")
    assert said.endswith(f"newest checkpoint in that one's place, or move {tmp_path}/second away)")
    assert refuse_changes(without, now, statuses(now, STEPS | {"second": 0})) == []


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        ({"first": 10, "second": 4, "third": 0}, False),
        ({"first": 10, "second": 10, "third": 10}, False),
        ({"first": 0, "second": 0, "third": 0}, False),
        ({"first": 9, "second": 10, "third": 0}, True),
        ({"first": 10, "second": 0, "third": 1}, True),
    ],
    ids=str,
)
def test_no_stage_is_trained_behind_one_that_has_begun(steps, refused):
    if refused:
        with pytest.raises(UserError, match="after it has begun"):
            refuse_gaps(statuses(recipe(), steps))
    else:
        refuse_gaps(statuses(recipe(), steps))


def test_a_rank_that_has_other_kernels_than_rank_0_is_refused(monkeypatch):
    """A node without Transformer Engine would train other layers, in another ring of ranks than its neighbours."""
    here = work_of(recipe())
    monkeypatch.setattr(
        manifest, "version_of", lambda name: "9.9" if name == "transformer-engine" else version_of(name)
    )
    with pytest.raises(UserError, match=r"version\.transformer-engine: 9\.9, but .* on rank 0"):
        refuse_other_work(here, work_of(recipe()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="may have fp8")
def test_a_precision_that_this_machine_lacks_is_refused_before_any_stage_trains(tmp_path, monkeypatch):
    with_fp8 = recipe({"third": {"precision": "fp8"}}, run_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"stage third: precision: fp8 needs CUDA and Transformer Engine"):
        refuse_precision(with_fp8)
    refuse_precision(recipe(run_dir=str(tmp_path)))
    done = statuses(with_fp8, dict.fromkeys(STEPS, 10))
    monkeypatch.setattr(prepare, "chain_status", lambda *_: done)
    refuse_precision(with_fp8)
