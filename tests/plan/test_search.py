"""Which layout is the best, what is said of those near a GPU's memory, and why the recipe's is slower."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from plan_shapes import LLAMA3_8B

from megatron_prolong.plan.batches import Batches, stage_batches
from megatron_prolong.plan.hardware import find_gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import PROLONG_SFT, BatchDocuments
from megatron_prolong.plan.memory import parked_bytes, peak_memory
from megatron_prolong.plan.report import StagePlan
from megatron_prolong.plan.search import Candidate, best_of, evaluate, frontier, layouts, search
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.schema import Layout

JOB = Job(LLAMA3_8B, Layout(tp=4, cp=2), 8, 2**16, 64)
H100 = find_gpu("h100-80g")
SHORT = [BatchDocuments.of(PROLONG_SFT.batch(0, 64))]


def running(throughput: float, tight: bool) -> Candidate:
    return Candidate(JOB, throughput=throughput, tight=tight)


def test_a_tight_layout_gives_way_to_a_roomy_one_that_is_nearly_as_fast() -> None:
    tight, near, far = running(100, True), running(91, False), running(89, False)
    assert best_of([tight, running(95, True), near, far]) is near
    assert best_of([near, tight]) is near
    assert best_of([tight, far]) is tight
    assert best_of([tight, replace(near, reason="out of memory")]) is tight
    assert best_of([replace(near, reason="out of memory")]) is None


def test_what_is_not_searched_stays_as_the_recipe_has_it() -> None:
    """Another stage may carry on an optimizer that only an unsharded one can continue."""
    own = Layout(tp=4, pp=2, first_stage_layers=15, distributed_optimizer=False, sequence_parallel=False)
    found = [job.layout for job in layouts(replace(JOB, layout=own), H100)]
    assert {layout.pp for layout in found} == {1, 2, 4, 8}
    assert {layout.first_stage_layers for layout in found} == {None}
    assert {(layout.distributed_optimizer, layout.sequence_parallel) for layout in found} == {(False, False)}


def test_the_stages_of_a_layout_are_divided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by every term of every stage's memory: with 1,024 GPUs that was most of the search."""
    divide, divided = Layout.stage_layers, []

    def counted(layout: Layout, num_layers: int) -> tuple[int, ...] | None:
        divided.append(layout)
        return divide(layout, num_layers)

    monkeypatch.setattr(Layout, "stage_layers", counted)
    evaluate(replace(JOB, layout=Layout(tp=8, pp=32), world_size=256), H100, SHORT)
    assert 1 <= len(divided) <= 3


def test_no_layout_beats_one_of_the_frontier_in_memory_and_speed() -> None:
    small, slow, worse, fast = (
        replace(running(throughput, False), needed_bytes=needed)
        for throughput, needed in ((10, 1), (9, 2), (20, 3), (30, 3))
    )
    failed = replace(running(99, False), reason="out of memory")
    assert frontier([slow, worse, fast, failed, small]) == [small, fast]


def test_tight_is_less_than_5_percent_of_the_memory_left() -> None:
    needed = H100.needed_bytes(peak_memory(JOB))
    tight = [
        evaluate(JOB, H100.model_copy(update={"memory_bytes": needed / share}), SHORT).tight
        for share in (0.94, 0.96, 1)
    ]
    assert tight == [False, True, True]


def test_what_a_gpu_needs_beyond_the_tensors_counts() -> None:
    memory = peak_memory(JOB)
    assert H100.needed_bytes(memory) == memory.total * (1 + H100.fragmentation) + H100.reserve_bytes
    assert H100.fragmentation > 0 and H100.reserve_bytes > 1e9


def test_a_network_of_many_cards_is_no_faster_than_the_node() -> None:
    many_cards = H100.model_copy(update={"inter_node_bandwidth": H100.intra_node_bandwidth})
    assert many_cards.bandwidth(64, 1) == H100.bandwidth(8, 1)


def test_reasons_that_differ_in_numbers_are_one_and_the_nearest_miss_needs_least() -> None:
    reasons = [f"cp: {cp} does not divide 100" for cp in (8, 16)]
    failed = [replace(running(0, False), reason=reason) for reason in (*reasons, "pp: too deep")]
    memory = peak_memory(JOB)
    misses = [
        Candidate(JOB, memory, needed, reason=f"out of memory: needs {needed}") for needed in (3.0, 1.0, 2.0)
    ]
    stage = load_recipe(Path(__file__).parents[2] / "examples" / "prolong_512k.yaml").stages[0]
    plan = StagePlan(stage, Batches([], ""), running(1, False), [running(1, False), *failed, *misses])
    assert plan.reasons() == [("out of memory", 3), (reasons[0], 2), ("pp: too deep", 1)]
    assert plan.nearest_miss() is misses[1]


def test_the_stage_that_parks_most_must_find_room_in_its_share_of_the_node() -> None:
    assert H100.parkable_bytes(4) == 2 * H100.parkable_bytes(8) == 2 * H100.parkable_bytes(64)
    job = replace(JOB, layout=Layout(tp=2, pp=4), offload=True)
    most, least = parked_bytes(job, 0), parked_bytes(job, 3)
    gpu = H100.model_copy(update={"node_memory_bytes": 2 * 8 * (most + least) / 2})
    assert least < most and evaluate(job, gpu, SHORT).reason.startswith("out of host memory: parks")
    assert evaluate(job, gpu.model_copy(update={"node_memory_bytes": 2 * 8 * most}), SHORT).runs


def test_a_layout_that_misses_by_little_does_not_read_as_if_it_fitted() -> None:
    needed = H100.needed_bytes(peak_memory(JOB))
    reason = evaluate(JOB, H100.model_copy(update={"memory_bytes": needed - 1e6}), SHORT).reason
    needs, has = map(float, re.findall(r"needs ([\d.]+) GB of ([\d.]+)", reason)[0])
    assert needs > has


def test_what_a_gpu_does_not_run_is_refused() -> None:
    """As the engine does it."""
    fp8 = replace(JOB, precision="fp8")

    def reason(job: Job, gpu: str) -> str:
        return evaluate(job, find_gpu(gpu), SHORT).reason

    assert reason(replace(JOB, precision="fp32"), "h100-80g") == "precision: fp32 runs on CPU only; use bf16"
    assert "does not run on compute capability 8.0: use precision: bf16" in reason(fp8, "a100-80g")
    assert "does not run on compute capability 9.0" in reason(replace(fp8, fp8_recipe="mxfp8"), "h100-80g")
    assert reason(replace(fp8, fp8_recipe="mxfp8"), "b200-180g") == ""
    many_heads = LLAMA3_8B.replace(num_kv_heads=32)
    wide = replace(JOB, shape=many_heads, layout=Layout(tp=16), world_size=16)
    assert reason(wide, "h100-80g").startswith("tp: 16 ranks leave the node of 8 GPUs")
    blockwise = replace(fp8, fp8_recipe="blockwise")
    assert "context parallelism" in reason(blockwise, "h100-80g")
    assert reason(replace(blockwise, layout=Layout(tp=4)), "h100-80g") == ""


def test_of_equally_fast_layouts_that_of_least_memory_is_first() -> None:
    """Without documents to split, the three exchanges are equally fast."""
    ranking = [candidate for candidate in search(JOB, H100, SHORT) if candidate.runs]
    equals = [
        (one.needed_bytes, other.needed_bytes)
        for one, other in pairwise(ranking)
        if one.throughput == other.throughput and one.job.layout.cp == other.job.layout.cp
    ]
    sizes = [(-one.throughput, one.job.layout.model_ranks) for one in ranking]
    assert sizes == sorted(sizes)
    assert any(one[0] == other[0] and one[1] < other[1] for one, other in pairwise(sizes))
    assert equals and all(one <= other for one, other in equals) and any(one < other for one, other in equals)


def test_why_the_recipe_s_layout_is_slower() -> None:
    """Few long documents on many ranks; a pipeline; layers computed twice; nothing where it is nearly as fast."""
    stage = load_recipe(Path(__file__).parents[2] / "examples" / "prolong_512k.yaml").stages[0]
    batches = stage_batches(stage, 4)
    base = Job(LLAMA3_8B, Layout(), 64, stage.sequence_length, stage.batch_sequences)
    best = replace(base, layout=Layout(tp=2, cp=16, cp_exchange="a2a"), recompute="selective")

    def why(ours: Job) -> str:
        written, other = (evaluate(job, H100, batches.documents) for job in (ours, best))
        assert written.runs and other.runs
        return StagePlan(stage, batches, written, [other]).why_slower()

    imbalance = why(replace(base, layout=Layout(tp=4, cp=2)))
    assert re.match(r"imbalance, [\d.]+ s/step instead of 0.0: 16 sequences .* dp 8, ", imbalance)
    pipeline = why(replace(base, layout=Layout(tp=4, pp=8, cp=2)))
    assert pipeline.endswith(": 16 micro-batches must fill and drain pp 8")
    repeated = why(replace(best, recompute="full"))
    assert re.match(r"attention, .*: recompute full, the best has selective", repeated)
    assert why(best) == ""
