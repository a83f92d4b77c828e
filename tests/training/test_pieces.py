"""How a run finds its way: pieces of a stage between evaluations, what ranks agree on, what is left in its log."""

from __future__ import annotations

import errno
import json
import math
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.mixture import Mixture
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.errors import JointError, UserError
from megatron_prolong.plan.flops import model_flops
from megatron_prolong.recipe.fp8 import TOKEN_MULTIPLE
from megatron_prolong.recipe.rope import Llama3Scaling, YarnScaling
from megatron_prolong.recipe.schema import (
    Carry,
    CheckpointSpec,
    LayoutOverride,
    LoggingSpec,
    Recipe,
    Yarn,
    settings_of,
)
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.signals import StopRequest
from megatron_prolong.training import prepare, run
from megatron_prolong.training import stage as stage_module
from megatron_prolong.training.changes import changes_since_start
from megatron_prolong.training.log import open_log
from megatron_prolong.training.prepare import StageInput, first_state
from megatron_prolong.training.replay import Replayed, _recorded, _start, parse_step
from megatron_prolong.training.run_directory import (
    MANIFEST,
    Checkpoint,
    StageStatus,
    latest_checkpoint,
    write_pointer,
)
from megatron_prolong.training.schedule import learning_rate
from megatron_prolong.training.stage import Preempted, Session
from megatron_prolong.training.state import TrainState
from megatron_prolong.training.step import StepMetrics
from megatron_prolong.training.stragglers import Stragglers
from tests.ranks import run_ranks

WORLD = World(0, 1, 0, torch.device("cpu"))
SHAPE = ModelShape(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, vocab_size=8,
    max_length=64, rope_base=1e4,
)  # fmt: skip
COST = CostModel.for_shape(SHAPE)
INITIAL = Checkpoint(Path("initial"), {"step": 0, "kind": "weights"})


def recipe(root: Path) -> Recipe:
    stage = {
        "name": "short", "sequence_length": 64, "batch_tokens": 64, "steps": 5, "lr": 1e-3, "mixture": "mock",
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "r", "run_dir": root / "run", "model": {"path": "somewhere"}, "stages": [stage],
            "evaluation": {"every": 2}, "checkpoint": {"every": 1},
        }
    )  # fmt: skip


def session(of: Recipe, log=None, stop=False) -> Session:
    request = StopRequest()
    request.received = signal.SIGTERM if stop else None
    return Session(of, WORLD, log, request, of.run_dir / "hf")


def save(stage_dir: Path, step: int) -> None:
    directory = stage_dir / f"step_{step:08d}"
    directory.mkdir(parents=True)
    manifest = {"format": 1, "kind": "training", "shape": SHAPE.to_dict(), "step": step}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    write_pointer(stage_dir, directory.name)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_stage_is_trained_in_pieces_that_end_where_it_is_evaluated(tmp_path, monkeypatch, one_rank):
    of, pieces = recipe(tmp_path), []

    def train_stage(session, stage, start, until):
        pieces.append((start.checkpoint.step, until))
        save(session.recipe.run_dir / stage.name, until)

    monkeypatch.setattr(run, "train_stage", train_stage)
    found = list(run._pieces(session(of), of.stages[0], INITIAL, INITIAL))
    assert [checkpoint.step for checkpoint in found] == [2, 4, 5]
    assert pieces == [(0, 2), (2, 4), (4, 5)]


def test_asked_to_stop_it_begins_no_further_piece(tmp_path, monkeypatch, one_rank):
    of = recipe(tmp_path)
    save(of.run_dir / "short", 2)
    monkeypatch.setattr(run, "train_stage", lambda *_: pytest.fail("a stage was begun"))
    pieces = run._pieces(session(of, stop=True), of.stages[0], INITIAL, INITIAL)
    assert next(pieces).step == 2
    with pytest.raises(Preempted, match="step 2 of stage short"):
        next(pieces)


def test_a_run_walks_its_stages_and_measures_what_is_to_be_measured(tmp_path, monkeypatch, one_rank, capsys):
    """The first stage goes on from where it was stopped; what had been measured before is not told again."""
    short = {**recipe(tmp_path).stages[0].model_dump(), "mixture": "mock"}
    stages = [short, {**short, "name": "long", "steps": 3}]
    fields = recipe(tmp_path).model_dump() | {"model": {"path": tmp_path / "somewhere"}, "stages": stages}
    of = Recipe.model_validate(fields)
    save(of.run_dir / "short", 1)
    trained, measured = [], []

    def train_stage(session, stage, start, until):
        trained.append(f"{stage.name} {start.checkpoint.directory.name[-1]}-{until}")
        save(session.recipe.run_dir / stage.name, until)

    def evaluate(directory):
        measured.append(f"{directory.parent.name} {directory.name[-1]}")
        return {"recall": 1.0} if "long" in measured[-1] else {}

    monkeypatch.setattr(run, "train_stage", train_stage)
    monkeypatch.setattr(run, "_write_sidecar", lambda *_: None)
    assert run.train(of, WORLD, StopRequest(), evaluate) == of.run_dir / "long/step_00000003"
    assert trained == ["short 1-2", "short 2-4", "short 4-5", "long 5-2", "long 2-3"]
    assert measured == ["short 2", "short 4", "short 5", "long 2", "long 3"]
    lines = map(json.loads, (of.run_dir / "metrics.jsonl").read_text().splitlines())
    assert [(line["stage"], line["step"]) for line in lines] == [("long", 2), ("long", 3)]
    other = of.model_copy(update={"stages": [stage.model_copy(update={"seed": 7}) for stage in of.stages]})
    with pytest.raises(UserError, match=r"short\.seed: 42 → 7 \(the stage is at step 5\)"):
        run.train(other, WORLD, StopRequest())
    clipped = of.model_copy(update={"optimizer": of.optimizer.model_copy(update={"clip": 0.5})})
    run.train(clipped, WORLD, StopRequest())
    assert "changed since the last start: optimizer.clip: 1.0 → 0.5\n" in capsys.readouterr().out


def test_asked_to_stop_it_measures_nothing_more(tmp_path):
    of = recipe(tmp_path)
    checkpoint = Checkpoint(Path("saved"), {"step": 2})
    asked = session(of, stop=True)
    with pytest.raises(Preempted, match="stopped before evaluating step 2 of stage short"):
        run._evaluate(asked, lambda _: pytest.fail("an evaluation was begun"), of.stages[0], checkpoint)
    meanwhile = session(of)

    def evaluate(_):
        meanwhile.stop.received = signal.SIGTERM
        return {}

    with pytest.raises(Preempted, match="stopped while evaluating step 2 of stage short"):
        run._evaluate(meanwhile, evaluate, of.stages[0], checkpoint)


def _slowly(init, tokenizer, directory: Path, seed: int) -> None:
    """Converting a large model takes longer than ranks may keep each other waiting elsewhere."""
    time.sleep(5)
    save(directory.parent, 0)
    (directory.parent / "step_00000000").rename(directory)


def _two_views(root: str) -> None:
    """Rank 1's node has not seen yet that `latest` was replaced."""
    found = run._newest_checkpoint(Path(root, str(dist.get_rank())))
    assert found is not None and found.step == 4
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    run.write_initial = _slowly
    init = {
        "num_layers": 1, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1, "ffn_hidden_size": 8,
        "max_length": 64, "rope_base": 1e4,
    }  # fmt: skip
    fields = recipe(Path(root)).model_dump() | {"model": {"init": init, "tokenizer": root}}
    assert run._initial_checkpoint(Recipe.model_validate(fields)).step == 0


def test_ranks_go_by_what_rank_0_sees_and_wait_for_its_conversion(tmp_path):
    for rank, step in enumerate((4, 2)):
        save(tmp_path / str(rank), step)
    (tmp_path / "run").mkdir()
    run_ranks(2, _two_views, str(tmp_path))


STEP = ["collected", "polled, 1 write", "5 s", "shown", "saved"]


def walk(
    of: Recipe, monkeypatch, clock: list[float], metrics: StepMetrics, until: int, stop=False
) -> list[str]:
    """The loop of a stage whose data takes 3 s, its update 2, its saving 100, and 50 to complete what was saved
    in the background; returns what it told in order."""
    told: list[str] = []

    def take(seconds, result=None):
        clock[0] += seconds
        return result

    def read(first_step):
        yield from ((step, take(3, ([], ()))) for step in range(first_step, of.stages[0].num_steps))

    def save(*_):
        told.append("saved")
        take(100)

    writer = SimpleNamespace(
        poll=lambda writing: told.append(f"polled, {writing:.0f} write") or take(50),
        finish=lambda: told.append("finished"),
        save=save,
        reading=lambda batches: batches,
    )
    at = SimpleNamespace(
        recipe=of, stage=of.stages[0], model=None, optimizer=None, batches=read,
        update=lambda *_: take(2, metrics), stragglers=Stragglers([]),
    )  # fmt: skip
    monkeypatch.setattr(stage_module, "CheckpointWriter", lambda *_, **__: writer)
    monkeypatch.setattr(stage_module, "dump_recipe", lambda _: "")
    monkeypatch.setattr(stage_module, "_manifest", lambda *_: {})
    monkeypatch.setattr(stage_module, "_facts", lambda *facts: told.append(f"{facts[-1]:.0f} s"))
    monkeypatch.setattr(stage_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(stage_module, "gc", SimpleNamespace(collect=lambda: told.append("collected")))
    log = SimpleNamespace(step=lambda *_, show: told.append("shown" if show else "not shown"))
    watchdog = SimpleNamespace(feed=lambda _: None)
    try:
        stage_module._walk(session(of, log, stop), at, TrainState(stage="short"), until, watchdog)
    except (JointError, Preempted) as error:
        told.append(str(error).partition(";")[0])
    return told


def test_waiting_for_data_is_part_of_a_steps_time_and_saving_is_not(tmp_path, monkeypatch):
    """Or a slow disk would show nowhere, and a checkpoint as a slow step."""
    metrics = StepMetrics(2.0, grad_norm=1.0, lr=1e-3, num_targets=3, updated=True)
    told = walk(recipe(tmp_path), monkeypatch, [0.0], metrics, until=3)
    assert told == STEP * 3 + ["finished"]


def test_asked_to_stop_it_completes_what_it_saves(tmp_path, monkeypatch):
    """In the background, it would be lost with the process."""
    metrics = StepMetrics(2.0, grad_norm=1.0, lr=1e-3, num_targets=3, updated=True)
    of = recipe(tmp_path).model_copy(update={"checkpoint": CheckpointSpec(every=100)})
    told = walk(of, monkeypatch, [0.0], metrics, until=3, stop=True)
    assert told == [*STEP, "finished", "stopped after step 1 of stage short"]
    assert walk(of, monkeypatch, [0.0], metrics, until=1, stop=True) == [*STEP, "finished"]
    of_another_rank = replace(metrics, told=[1.0, 0.0, 2.0, 2.0])
    of_it = walk(of, monkeypatch, [0.0], of_another_rank, until=3)
    assert of_it == ["collected", "polled, 0 write", *told[2:]]


def test_every_so_many_steps_and_the_last_are_shown_and_saved(tmp_path, monkeypatch):
    metrics = StepMetrics(2.0, grad_norm=1.0, lr=1e-3, num_targets=3, updated=True)
    often = {"checkpoint": CheckpointSpec(every=3), "logging": LoggingSpec(every=2)}
    told = walk(recipe(tmp_path).model_copy(update=often), monkeypatch, [0.0], metrics, until=5)
    quiet, shown = [*STEP[:3], "not shown"], STEP[:4]
    assert told == [*quiet, *shown, *quiet, "saved", *shown, *shown, "saved", "finished"]


def test_a_run_that_goes_wrong_stops_and_completes_what_it_saved_before(tmp_path, monkeypatch):
    metrics = StepMetrics(math.nan, grad_norm=math.nan, lr=1e-3, num_targets=3, updated=False)
    told = walk(recipe(tmp_path), monkeypatch, [0.0], metrics, until=5)
    assert told[:-1] == STEP * 4 + ["collected", "polled, 1 write", "finished"]
    assert told[-1].startswith("stage short: 5 steps in a row had no targets")


def test_a_line_of_the_log_is_about_its_own_step_and_a_single_rank():
    at = SimpleNamespace(
        model=SimpleNamespace(shape=SHAPE),
        world=World(1, 4, 0, torch.device("cpu")),
        stragglers=Stragglers([], balance=0.75),
    )
    sequence = PackedSequence(np.zeros(64, np.uint32), np.array([0, 20, 64]), None, Identity("data", "-", 0))
    metrics = StepMetrics(2.0, grad_norm=1.0, lr=1e-3, num_targets=3, updated=True)
    before, after = (
        TrainState("short", step, tokens=64 * step, skipped=step - 6, domain_tokens={"d": 64 * step})
        for step in (7, 8)
    )
    facts = stage_module._facts(at, before, after, metrics, [sequence], 2.0)
    assert (facts["tokens"], facts["tokens_per_second"]) == (512, 32)
    assert (facts["valid_tokens"], facts["skipped"], facts["domains"]) == (3, 2, {"d": 512})
    assert (facts["loss"], facts["grad_norm"], facts["lr"], facts["balance"]) == (2.0, 1.0, 1e-3, 0.75)
    assert facts["tflops_per_rank"] == pytest.approx(model_flops(SHAPE, 64, 20**2 + 44**2) / 2 / 4 / 1e12)
    assert 2**26 < facts["peak_memory_bytes"] < 2**40


@pytest.mark.parametrize(
    ("carry", "expected"),
    [
        ({}, ("previous", True)),
        ({"optimizer": False}, ("previous", False)),
        ({"weights": False, "optimizer": False}, ("initial", False)),
    ],
    ids=["all", "weights", "nothing"],
)
def test_what_a_stage_takes_from_the_one_before(tmp_path, carry, expected):
    stage = recipe(tmp_path).stages[0].model_copy(update={"carry": Carry(**carry)})
    previous = Checkpoint(Path("previous"), {"step": 9, "kind": "training"})
    found = run.stage_input(StageStatus(stage, None), previous, INITIAL)
    assert (str(found.checkpoint.directory), found.optimizer, found.resume) == (*expected, False)
    assert not run.stage_input(StageStatus(stage, None), INITIAL, INITIAL).optimizer  # there is none yet
    own = Checkpoint(Path("own"), {"step": 2, "kind": "training"})
    assert run.stage_input(StageStatus(stage, own), previous, INITIAL) == StageInput(own, True, True)


def test_a_stage_is_built_with_its_own_settings(tmp_path, monkeypatch, one_rank):
    """Of which some only change memory, and would be missed nowhere."""
    own = {"precision": "bf16", "recompute": "selective", "offload_activations": True, "rope_base": 8e6}
    whole = {"fp8_recipe": "blockwise", "fp8_parameters": True, "loss_chunk_tokens": 99}
    of = recipe(tmp_path).model_copy(update={**whole, "precision": "fp32"})
    other = {"sequence_length": 128, "batch_tokens": 128, "layout": LayoutOverride(cp=2)}
    stage = of.stages[0].model_copy(update={**own, **other})
    built = {}

    def build_model(shape, layout, **options):
        built.update(options, rope_base=shape.rope_base, max_length=shape.max_length)
        raise UserError("that is enough")

    monkeypatch.setattr(prepare, "build_model", build_model)
    start = StageInput(Checkpoint(Path("saved"), {"shape": SHAPE.to_dict()}), optimizer=True, resume=False)
    with pytest.raises(UserError, match="enough"):
        prepare.prepare_stage(of, stage, start, WORLD, None)
    assert built.items() >= {**own, **whole, "max_length": 128, "rank_tokens": 64}.items()


def test_an_update_has_the_rate_of_its_step_and_times_each_ranks_own_part(tmp_path, monkeypatch):
    of = recipe(tmp_path)
    stage = of.stages[0].model_copy(update={"skip_steps": "2", "precision": "fp8"})
    told = []

    def train_step(*_, spec, lr, computed, tell):
        told.append((spec, lr))
        computed()
        return StepMetrics(2.0, 1.0, lr, 3, updated=True, told=[3 * number for number in tell()])

    def micro_batches(*_, token_multiple):
        told.append(token_multiple)

    plans = [
        [SimpleNamespace(share=SimpleNamespace(seconds=seconds)) for seconds in share]
        for share in ([1, 2], [4])
    ]
    clock = SimpleNamespace(
        start=lambda: told.append("start"), stop=lambda: told.append("stop"), seconds=lambda: 9.0
    )
    monkeypatch.setattr(prepare, "micro_batches", micro_batches)
    monkeypatch.setattr(prepare, "train_step", train_step)
    stragglers = SimpleNamespace(note=lambda *found: told.append(found))
    at = prepare.StageRun(
        of, stage, settings_of(of, stage), World(1, 3, 1, WORLD.device), None, None, None, None, None, clock,
        stragglers,
    )  # fmt: skip
    assert at.update(0, [], plans, lambda: (True, 5)).told == [3, 15, 0, 27, 0]
    expected = ["start", TOKEN_MULTIPLE, (of.optimizer, learning_rate(stage, 0)), "stop"]
    assert told == [*expected, ([0.0, 27.0, 0.0], [3, 4])]
    assert not at.update(1, [], plans).wanted and len(told) == 5
    assert at.update(2, [], plans).told == [0, 27, 0]
    assert told[7] == (of.optimizer, learning_rate(stage, 2)) and told[7] != told[2]


def test_documents_are_dealt_out_ahead_of_training(tmp_path, monkeypatch):
    """Training would wait for it between two steps."""
    of = recipe(tmp_path)
    stage = of.stages[0]
    mixture = Mixture.of_stage(stage, vocab_size=16)
    alone = SimpleNamespace(size=1, rank=0)
    groups = SimpleNamespace(dp=SimpleNamespace(size=2, rank=0), cp=alone, pp=alone)
    at = prepare.StageRun(
        of, stage, settings_of(of, stage), WORLD, groups, None, None, mixture, COST, None, None
    )
    threads, share_out = [], prepare.share_out

    def spy(*arguments):
        threads.append(threading.current_thread().name)
        return share_out(*arguments)

    monkeypatch.setattr(prepare, "share_out", spy)
    for step, (sequences, assignment) in at.batches(1):
        assert [packed.identity for packed in sequences] == [
            mixture.read(ref).identity for ref in mixture.batch(step)
        ]
        assert assignment == share_out(sequences, groups, stage.micro_batch_length, COST)
    assert step == stage.num_steps - 1
    assert len(threads) == step and all(name.startswith("read-ahead") for name in threads)


def test_a_stages_yarn_stands_in_for_the_incoming_scaling(tmp_path):
    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=64)
    saved = {"shape": SHAPE.replace(rope_scaling=llama3).to_dict()}
    start = StageInput(Checkpoint(Path("saved"), saved), optimizer=True, resume=False)
    plain = recipe(tmp_path).stages[0]
    assert start.shape(plain).rope_scaling == llama3 and start.shape(plain).rope_base == 1e4
    assert start.shape(plain.model_copy(update={"sequence_length": 32})).max_length == 64
    yarn = start.shape(plain.model_copy(update={"yarn": Yarn(factor=2, original_length=64)})).rope_scaling
    expected = YarnScaling(factor=2.0, original_max_length=64, attention_factor=0.1 * math.log(2) + 1)
    assert yarn == expected


def test_reading_a_checkpoint_twice_is_progress(tmp_path, monkeypatch, one_rank):
    """A watchdog that hears of nothing for an hour ends the process; each reading may take that long."""
    order = []

    def stop(*_, **__):
        raise UserError("that is enough")

    monkeypatch.setattr(prepare, "build_model", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "verify_checkpoint", lambda _: order.append("read"))
    monkeypatch.setattr(prepare, "build_optimizer", stop)
    of = recipe(tmp_path)
    start = StageInput(Checkpoint(Path("saved"), {"shape": SHAPE.to_dict()}), optimizer=True, resume=False)
    with pytest.raises(UserError, match="enough"):
        prepare.prepare_stage(of, of.stages[0], start, WORLD, None, verified=lambda: order.append("fed"))
    assert order == ["read", "fed"]


def test_domains_of_one_name_are_counted_apart(tmp_path):
    """`prolong data pack --lengths` calls every source's packs alike: 65536-524288."""
    directories = [tmp_path / "code/64-64", tmp_path / "books/64-64"]
    stage = recipe(tmp_path).stages[0].model_copy(update={"mixture": dict.fromkeys(directories, 0.5)})
    sequences = [
        PackedSequence(np.zeros(length, np.uint32), np.array([0, length]), None, Identity(str(path), "-", 0))
        for path, length in zip(directories, (64, 60), strict=True)
    ]
    metrics = StepMetrics(2.0, grad_norm=1.0, lr=1e-3, num_targets=3, updated=True)
    state = TrainState(stage="short").after(stage, sequences, metrics)
    assert state.domain_tokens == {"code/64-64": 64, "books/64-64": 60}
    alone = stage.model_copy(update={"mixture": {directories[0]: 1.0}})
    assert state.after(alone, sequences[:1], metrics).domain_tokens["64-64"] == 64


def test_half_a_line_of_a_process_that_died_does_not_spoil_the_next(tmp_path):
    of = recipe(tmp_path)
    metrics = of.run_dir / "metrics.jsonl"
    for step in (1, 2):
        with open_log(of) as log:
            log._write({"stage": "short", "step": step, "loss": 2.0})
            assert metrics.read_text().endswith("2.0}\n"), "a kill would lose it"
        with metrics.open("a") as file:
            file.write('{"stage": "short", "step": 9, "lo')
    assert _recorded(metrics, "short").keys() == {1, 2}
    lines = metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:2]] == [1, 2] and len(lines) == 3


def test_tensorboard_files_that_cannot_be_written_are_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    """Its writer's thread ends with the error, and raises it at any later step, and when it is closed."""

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with open_log(recipe(tmp_path)) as log:
        thread = log.tensorboard.file_writer.event_writer._async_writer._worker
        monkeypatch.setattr(thread._record_writer, "write", fails)
        log._scalars("short", 1, {"loss": 2.0})
        thread.join(60)
        for step in (2, 3):
            log._scalars("short", step, {"loss": 2.0})
    assert capsys.readouterr().out.count("warning: tensorboard cannot be written") == 1


def test_a_place_that_takes_no_tensorboard_files_is_no_reason_not_to_start(tmp_path, capsys):
    of = recipe(tmp_path)
    of.run_dir.mkdir(exist_ok=True)
    (of.run_dir / "tensorboard").touch()
    with open_log(of) as log:
        log._scalars("short", 1, {"loss": 2.0})
    said = capsys.readouterr().err
    assert said.startswith("warning: nothing goes to ") and "tensorboard until the next start: " in said


def test_weights_and_biases_out_of_reach_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    """At a requeue in the night, with the network down."""
    begun = MagicMock()
    init = Mock(side_effect=[ConnectionError("timed out"), begun])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    of = recipe(tmp_path)
    of = of.model_copy(update={"logging": of.logging.model_copy(update={"wandb": "a-project"})})
    with open_log(of) as log:
        log._scalars("short", 1, {"loss": 2.0})
    assert (
        "warning: nothing goes to Weights & Biases until the next start: timed out" in capsys.readouterr().err
    )
    with open_log(of) as log:
        log._scalars("short", 2, {"loss": 2.0})
    begun.__enter__().log.assert_called_once_with({"short/step": 2, "short/loss": 2.0})
    begun.__exit__.assert_called_once()


def test_what_was_recorded_of_a_step_is_the_last_line_of_its_stage_with_a_loss(tmp_path):
    of = recipe(tmp_path)
    with open_log(of) as log:
        for stage, step, facts in (
            ("short", 1, {"loss": 2.0}),
            ("short", 1, {"loss": math.nan}),
            ("short", 2, {"tokens": 64}),  # passed over
            ("long", 1, {"loss": 3.0}),
        ):
            log._write({"stage": stage, "step": step, **facts})
    recorded = _recorded(of.run_dir / "metrics.jsonl", "short")
    assert recorded.keys() == {1} and math.isnan(recorded[1]["loss"])


def test_without_a_pointer_the_last_checkpoint_is_the_newest(tmp_path):
    """A run would otherwise start anew, and overwrite the steps of the one before as it came to them."""
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step_00000006.partial").mkdir()
    (tmp_path / "latest").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 4


def test_what_is_in_the_way_of_the_initial_weights_is_not_deleted(tmp_path, monkeypatch):
    """The converter refuses it; a conversion of ours is complete or not there."""
    (tmp_path / "initial" / "theirs").mkdir(parents=True)
    found = []
    monkeypatch.setattr(run, "to_megatron", lambda _, out: found.extend(out.iterdir()))
    run._write_initial(recipe(tmp_path), tmp_path / "initial")
    assert found == [tmp_path / "initial" / "theirs"]
    (tmp_path / "initial" / MANIFEST).touch()
    monkeypatch.setattr(run, "to_megatron", lambda *_: pytest.fail("converted again"))
    run._write_initial(recipe(tmp_path), tmp_path / "initial")


def test_a_damaged_recipe_of_the_run_says_where_another_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: [\n")
    with pytest.raises(UserError, match=r"recipe\.yaml of its newest checkpoint in its place$"):
        changes_since_start(recipe(tmp_path))


def test_a_step_after_a_stage_is_made_again_without_the_runs_model(tmp_path):
    of = recipe(tmp_path)
    short = of.stages[0]
    of = of.model_copy(update={"stages": [short, short.model_copy(update={"name": "long"})]})
    save(of.run_dir / "short", 5)
    (of.run_dir / "recipe.yaml").touch()
    assert _start(of, of.stages[1], 1).checkpoint.step == 5
    with pytest.raises(UserError, match="no checkpoint before step 1 of stage short"):
        _start(of, short, 1)


def test_a_step_of_a_stage_that_takes_nothing_over_is_made_again_from_the_first_weights(tmp_path):
    of = recipe(tmp_path)
    short = of.stages[0]
    fresh = short.model_copy(update={"name": "fresh", "carry": Carry(weights=False, optimizer=False)})
    of = of.model_copy(update={"stages": [short, fresh]})
    save(of.run_dir / "short", 5)
    save(of.run_dir, 0)
    (of.run_dir / "step_00000000").rename(of.run_dir / "initial")
    (of.run_dir / "recipe.yaml").touch()
    start = _start(of, fresh, 1)
    assert (start.checkpoint.directory.name, start.optimizer, start.resume) == ("initial", False, False)


def test_a_step_is_made_again_from_the_newest_checkpoint_before_it(tmp_path):
    of = recipe(tmp_path)
    of.run_dir.mkdir()
    (of.run_dir / "recipe.yaml").touch()
    for step in (1, 2, 3, 5):
        save(of.run_dir / "short", step)
    for step, expected in ((5, 3), (4, 3), (3, 2)):
        start = _start(of, of.stages[0], step)
        assert (start.checkpoint.step, start.optimizer, start.resume) == (expected, True, True)
    (of.run_dir / "short" / "latest").write_text("step_00000002\n")  # what came after it is given up
    assert _start(of, of.stages[0], 5).checkpoint.step == 2
    (of.run_dir / "short" / "latest").write_text("step_00000004\n")
    with pytest.raises(UserError, match="'step_00000004' is no checkpoint there"):
        _start(of, of.stages[0], 5)


def test_a_step_is_made_again_that_the_run_never_came_to():
    found = StepMetrics(math.nan, math.nan, lr=1e-3, num_targets=0, updated=False)
    lines = list(Replayed(7, found, [], None).lines())
    assert lines == ["loss nan  grad norm nan  lr 0.001", "0 targets; the update was skipped", "samples:"]


def test_the_only_stage_needs_no_name_where_a_step_is_chosen(tmp_path):
    of = recipe(tmp_path)
    for text, step in (("1", 1), ("5", 5), ("short:3", 3)):
        assert parse_step(text, of) == (of.stages[0], step)
    for text in ("0", "6", "-1", "last", "", "short:", "short:0", "short:last"):
        with pytest.raises(UserError, match=r"stage short has the steps 1 to 5$"):
            parse_step(text, of)
    with pytest.raises(UserError, match=r"no stage long; it has short$"):
        parse_step("long:1", of)


def test_what_is_not_there_is_named(tmp_path):
    of = recipe(tmp_path)
    with pytest.raises(UserError, match="no run is here"):
        _start(of, of.stages[0], 1)
    (tmp_path / "short" / "step_00000002").mkdir(parents=True)
    for lost in ("step_00000003", "", "\0\0", "../other", "short/step_00000002"):
        write_pointer(tmp_path / "short", lost)
        with pytest.raises(
            UserError, match=rf"{re.escape(repr(lost))} is no checkpoint there; .*: step_00000002$"
        ):
            latest_checkpoint(tmp_path / "short")
    write_pointer(tmp_path / "short", "step_00000002")
    (tmp_path / "short" / "step_00000001").mkdir()
    with pytest.raises(
        UserError, match=r"holds no prolong\.json; copy it again, or .* into .*latest: step_00000001$"
    ):
        latest_checkpoint(tmp_path / "short")
    for step in (1, 2):
        (tmp_path / "short" / f"step_{step:08d}").rmdir()
    with pytest.raises(UserError, match=r"'step_00000002' is no checkpoint there; .*: none left$"):
        latest_checkpoint(tmp_path / "short")


@pytest.mark.parametrize("manifest", [{}, {"training": {"stage": "short", "curriculum": 1}}])
def test_a_training_state_of_another_version_is_named(manifest):
    run = SimpleNamespace(mixture=SimpleNamespace(fingerprint=lambda: "same"))
    start = StageInput(Checkpoint(Path("saved"), manifest), optimizer=True, resume=True)
    with pytest.raises(UserError, match=r"^saved: this version cannot continue"):
        first_state(run, start)
