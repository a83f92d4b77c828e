"""Published speeds, costs and memory limits that the planner is judged by, with their sources.

Nothing here is fitted: the numbers are what others report, and what they do not say (the number of GPUs of
ProLong's runs, NeMo's recomputation) is stated as an assumption next to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from programs import Sharded, longest

from megatron_prolong.plan.flops import model_flops
from megatron_prolong.plan.hardware import Gpu, find_gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import PROLONG_64K, PROLONG_512K, BatchDocuments, single_document
from megatron_prolong.plan.search import RECOMPUTE_MODES, Candidate, evaluate, search
from megatron_prolong.recipe.counts import ForwardFlops, num_parameters
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import ModelShape

K, M = 2**10, 2**20
FACTS = Path(__file__).with_name("facts.json")


def llama(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, dim: int = 128
) -> ModelShape:
    """A shape by its sizes."""
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=vocab,
        max_length=M,
        rope_base=5e5,
    )


LLAMA3_8B = llama(32, 4096, 14336, 32, 8, 128256)
LLAMA2_7B = llama(32, 4096, 11008, 32, 32, 32000)
QWEN3_8B = llama(36, 4096, 12288, 32, 8, 151936)
QWEN3_4B = llama(36, 2560, 9728, 32, 8, 151936)
# MPT's MLP is not gated: two matrices of 16384 cost as much as three of 10923.
MPT_7B = llama(32, 4096, 10923, 32, 32, 50432)


@dataclass(frozen=True)
class Fact:
    """One published number and the planner's.

    Attributes:
        what: system, model, hardware, length.
        unit: of both numbers.
        assumed: what the source does not say.
    """

    what: str
    unit: str
    reported: float
    predicted: float
    source: str
    assumed: str = ""

    @property
    def error(self) -> float:
        """Predicted over reported, minus one."""
        return self.predicted / self.reported - 1

    def row(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "predicted": round(self.predicted, 1), "error": round(self.error, 3)}


# --- ProLong --------------------------------------------------------------------------------------------------


def prolong() -> list[Fact]:
    """GPU-hours and throughput of the paper's own runs (FSDP, FlashAttention-2, full checkpointing)."""
    h100 = find_gpu("h100-80g")
    facts = []
    paper = "arXiv 2410.02660"
    hours = ((PROLONG_64K, 64, 1, 5000, 2_200), (PROLONG_512K, 16, 8, 2500, 12_200))
    for mixture, sequences, sp, steps, reported in hours:
        program = Sharded(Job(LLAMA3_8B, _ulysses(sp), 64, mixture.sequence_length, sequences))
        batches = [mixture.batch(step, sequences) for step in range(64)]
        seconds = program.step_seconds(h100, batches, sort=True)
        facts.append(
            Fact(
                f"ProLong, stage {mixture.sequence_length // K}K, whole stage",
                "H100-hours",
                reported,
                seconds * steps * 64 / 3600,
                f"{paper}, table 9",
                "64 GPUs; saving, evaluation and restarts not modelled",
            )
        )
    bench = Sharded(Job(LLAMA3_8B, Layout(), 8, 64 * K, 64))
    drawn = [PROLONG_64K.batch(step, 64) for step in range(64)]
    whole = [single_document(64 * K).batch(0, 64)]
    rows = (
        ("full attention", whole, False, 2770),
        ("varlen", drawn, False, 2780),
        ("varlen, sorted", drawn, True, 3095),
    )
    for name, cost, sort, reported in rows:
        speed = bench.job.batch_tokens / 8 / bench.step_seconds(h100, cost, sort=sort)
        what = f"ProLong, 64K bench, 8 GPUs, {name}"
        facts.append(Fact(what, "tok/s/GPU", reported, speed, f"{paper}, table 15", "8 sequences per GPU"))
    return facts


def _ulysses(ranks: int) -> Layout:
    return Layout(cp=ranks, cp_exchange="a2a")


# --- other systems' throughput --------------------------------------------------------------------------------


def nemo() -> list[Fact]:
    """NeMo on Megatron-Core: TFLOP/s per GPU, counting attention as if it were not causal (12·L·h per token²)."""
    facts = []
    h100 = find_gpu("h100-80g")
    rows = ((64, 4, 2, 574), (128, 4, 4, 555), (256, 4, 8, 549), (512, 8, 16, 549), (1024, 8, 32, 536))
    for kilo, tp, cp, reported in rows:
        layout = Layout(tp=tp, cp=cp, cp_exchange="p2p")
        base = Job(
            LLAMA2_7B, layout, kilo, kilo * K, kilo // (tp * cp), precision="fp8", transformer_engine=True
        )
        best = _least_recompute(base, h100)
        facts.append(
            Fact(
                f"NeMo 24.03, Llama-2-7B FP8, {kilo} H100, {kilo}K, tp {tp} cp {cp}",
                "TFLOP/s/GPU, not causal",
                reported,
                _not_causal_tflops(best),
                "NVIDIA/NeMo docs/source/performance/performance_long_sequence.md",
                f"one sequence per data-parallel rank; recompute {best.job.recompute}",
            )
        )
    b200 = find_gpu("b200-180g")
    for kilo, reported in ((64, 1600), (256, 1590), (1024, 1608)):
        job = Job(LLAMA3_8B, Layout(), kilo, kilo * K, 8, precision="fp8", transformer_engine=True)
        best = next(c for c in search(job, b200, _whole_documents(job)) if c.runs)
        facts.append(
            Fact(
                f"NeMo 25.04, Llama-3-8B FP8, {kilo} B200, {kilo}K",
                "TFLOP/s/GPU, not causal",
                reported,
                _not_causal_tflops(best),
                "the same page, 25.04.rc2",
                f"8 sequences; our best layout ({best.name}); convention of 24.03",
            )
        )
    return facts


def _least_recompute(job: Job, gpu: Gpu) -> Candidate:
    batches = _whole_documents(job)
    options = [evaluate(replace(job, recompute=mode), gpu, batches) for mode in RECOMPUTE_MODES]
    return next(option for option in options if option.runs)


def _whole_documents(job: Job) -> list[BatchDocuments]:
    return [BatchDocuments.of(single_document(job.sequence_length).batch(0, job.batch_sequences))]


def _not_causal_tflops(candidate: Candidate) -> float:
    assert candidate.time is not None
    job = candidate.job
    pairs = job.batch_sequences * float(job.sequence_length) ** 2
    extra = 3 * ForwardFlops.of(job.shape).attention_per_pair * pairs
    flops = model_flops(job.shape, job.batch_tokens, pairs) + extra
    return flops / candidate.time.total / job.world_size / 1e12


def sharded() -> list[Fact]:
    """FSDP and ZeRO-3 programs on single documents: tokens per second and GPU."""
    h100, a100 = find_gpu("h100-80g"), find_gpu("a100-80g")
    titan = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md, table 2"
    foundry = "llm-foundry scripts/train/benchmarking/README.md"
    easy = "EasyContext README"
    ring, gather = Layout(cp=8, cp_exchange="p2p"), Layout(cp=8, cp_exchange="all_gather")
    rows: list[tuple[str, Gpu, Sharded, int, str, str]] = []
    for kilo, speed in ((64, 2540), (128, 1071), (256, 548)):
        job = Job(LLAMA3_8B, gather, 8, kilo * K, 1, precision="fp8")
        name = f"torchtitan, Llama-3.1-8B Float8, 8 H100 (96 GB, 500 W), {kilo}K"
        rows.append((name, h100, Sharded(job), speed, titan, "cp 8; our H100 is the 700 W one"))
    for kilo, speed in ((32, 3318), (64, 1956)):
        job = Job(MPT_7B, Layout(), 8, kilo * K, 8)
        rows.append((f"llm-foundry, MPT-7B, 8 H100, {kilo}K", h100, Sharded(job), speed, foundry, ""))
    for kilo, total in ((64, 7816), (128, 4266)):
        job = Job(LLAMA2_7B, ring, 8, kilo * K, 1)
        rows.append((f"EasyContext, Llama-2-7B, 8 A100, {kilo}K", a100, Sharded(job), total // 8, easy, ""))
    trl = Sharded(Job(QWEN3_8B, ring, 8, M, 1, transformer_engine=True))
    rows.append(
        ("TRL, Qwen3-8B, 8 H100, 1M", h100, trl, 345, "huggingface/trl PR 6846", "ring, full recompute")
    )
    ulysses = Sharded(Job(QWEN3_4B, _ulysses(4), 4, 64 * K, 1))
    source = "huggingface/blog ulysses-sp.md"
    rows.append(
        ("HF Ulysses, Qwen3-4B, 4 H100, 64K", h100, ulysses, 3349, source, "Adam on the CPU not modelled")
    )
    facts = []
    for what, gpu, program, reported, origin, assumed in rows:
        job = program.job
        batch = single_document(job.sequence_length).batch(0, job.batch_sequences)
        seconds = program.step_seconds(gpu, [batch], sort=False)
        speed = job.batch_tokens / job.world_size / seconds
        facts.append(Fact(what, "tok/s/GPU", reported, speed, origin, assumed))
    return facts


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryFact:
    """Whether something ran out of memory, as reported and as predicted."""

    what: str
    ran: bool
    needed_gb: float
    capacity_gb: float
    source: str

    @property
    def predicted_to_run(self) -> bool:
        """What the planner says."""
        return self.needed_gb <= self.capacity_gb

    def row(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.__dict__,
            "needed_gb": round(self.needed_gb, 1),
            "predicted_to_run": self.predicted_to_run,
        }


def out_of_memory() -> list[MemoryFact]:
    """ProLong's users' reports, and its own runs (which fitted)."""
    h100, a100 = find_gpu("h100-80g"), find_gpu("a100-80g")
    whole = 2 + 4 + 4  # logits in bf16 and fp32, and their gradient
    rows = (
        (
            "64K, 4 A800, no sequence parallelism, whole logits",
            a100,
            1,
            4,
            64,
            whole,
            False,
            "ProLong issue 10",
        ),
        ("512K, 8 A100, sequence parallel 8, chunked loss", a100, 8, 8, 512, 0, False, "ProLong issue 16"),
        ("64K, 8 H100, chunked loss", h100, 1, 8, 64, 0, True, "ProLong train_64K.sh"),
        (
            "512K, 64 H100, sequence parallel 8, chunked loss",
            h100,
            8,
            64,
            512,
            0,
            True,
            "ProLong train_512K.sh",
        ),
    )
    facts = []
    for what, gpu, sp, world, kilo, logits, ran, source in rows:
        program = Sharded(Job(LLAMA3_8B, _ulysses(sp), world, kilo * K, world // sp), whole_logits=logits)
        facts.append(MemoryFact(what, ran, program.needed_bytes(gpu) / 1e9, gpu.memory_bytes / 1e9, source))
    return facts


def max_lengths() -> list[Fact]:
    """ArcticTraining's longest sequences for Llama-3.1-8B (ZeRO-3, Adam in host memory)."""
    h100, h200 = find_gpu("h100-80g"), find_gpu("h200-141g")
    one, eight = Job(LLAMA3_8B, Layout(), 1, K, 1), Job(LLAMA3_8B, Layout(), 8, K, 8)
    spread = replace(eight, layout=_ulysses(8), batch_sequences=1)
    whole = 2 + 4 + 4
    rows = (
        ("1 H100, baseline", h100, Sharded(one, master_bytes=0, whole_logits=whole), 36 * K),
        ("1 H100, tiled loss and MLP, offload", h100, Sharded(one, 0, 0, True, True), 500 * K),
        ("8 H100, baseline", h100, Sharded(eight, master_bytes=4, whole_logits=whole), 32 * K),
        ("8 H100, tiled loss", h100, Sharded(eight, master_bytes=4), 160 * K),
        ("8 H100, + Ulysses", h100, Sharded(spread, master_bytes=4), 1.1 * M),
        ("8 H100, + offload", h100, Sharded(spread, 4, 0, True), 2.4 * M),
        ("8 H100, + tiled MLP", h100, Sharded(spread, 4, 0, True, True), 3.8 * M),
        ("1 H200, baseline", h200, Sharded(one, master_bytes=0, whole_logits=whole), 65 * K),
        ("1 H200, tiled loss", h200, Sharded(one, master_bytes=0), 300 * K),
        ("1 H200, + offload", h200, Sharded(one, 0, 0, True), 650 * K),
        ("1 H200, + tiled MLP", h200, Sharded(one, 0, 0, True, True), 1.2 * M),
    )
    source = "ArcticTraining projects/sequence-parallelism/run-*.yml"
    return [
        Fact(f"ArcticTraining, {what}", "K tokens", reported / K, longest(program, gpu) / K, source)
        for what, gpu, program, reported in rows
    ]


def parameter_facts() -> list[Fact]:
    """Weights of published models: exact."""
    source = "the models' safetensors index"
    return [
        Fact("Llama-3-8B", "weights", 8_030_261_248, num_parameters(LLAMA3_8B), source),
        Fact("Llama-2-7B", "weights", 6_738_415_616, num_parameters(LLAMA2_7B), source),
    ]
