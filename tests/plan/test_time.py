"""FLOPs against PyTorch's own counter, loads against brute force, and the effects that must be there."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from plan_shapes import LLAMA3_8B, TINY

from megatron_prolong.plan.flops import model_flops
from megatron_prolong.plan.hardware import find_gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import LONG_TOKENS, PROLONG_512K, BatchDocuments, single_document
from megatron_prolong.plan.memory import GPU_KERNELS, kept_by_chunk, kept_by_layer, parked_bytes
from megatron_prolong.plan.search import RECOMPUTE_MODES, evaluate
from megatron_prolong.plan.time import RankLoads, Rates, mfu, rates, step_time, tokens_per_second_per_gpu
from megatron_prolong.plan.volume import context_bytes
from megatron_prolong.plan.weights import stage_weights
from megatron_prolong.recipe.counts import ForwardFlops
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import to_hf_config

H100 = find_gpu("h100-80g")
JOB = Job(LLAMA3_8B, Layout(tp=4, cp=2), 64, 2**19, 16)
BATCHES = [BatchDocuments.of(PROLONG_512K.batch(step, 16)) for step in range(8)]


def test_matrix_products_are_what_pytorch_counts() -> None:
    """transformers' Llama, forward and backward, under torch's FlopCounterMode; attention apart (eager, 4·n²)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = 48
    model = LlamaForCausalLM(LlamaConfig(**to_hf_config(TINY), attn_implementation="eager"))
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    flops = ForwardFlops.of(TINY)
    attention = 2 * flops.attention_per_pair * tokens**2  # eager computes all pairs, twice the causal ones
    expected = 3 * ((flops.layers_per_token + flops.output_per_token) * tokens + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_six_n_plus_causal_attention() -> None:
    """45.0 GFLOP per token of matrix products and 6·L·h·s of attention (the convention of PEERS and NeMo)."""
    per_token = model_flops(LLAMA3_8B, 1, 0)
    assert per_token == pytest.approx(6 * (8_030_261_248 - 128_256 * 4096), rel=1e-3)
    assert model_flops(LLAMA3_8B, 0, 1) == 6 * 32 * 4096


def test_dealing_documents_is_never_better_than_possible_and_within_graham_s_bound() -> None:
    one = Rates(1e-6, 0.0, 0.0, 0.0, 1e-11, local_tokens=2**30, overlaps=False)
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(LONG_TOKENS, 10 * LONG_TOKENS, size=7)
        loads = RankLoads.of(one, BatchDocuments.of([lengths]), dp=3)
        costs = one.seconds(lengths)
        best = min(
            max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(3))
            for ranks in product(range(3), repeat=7)
        )
        assert best - 1e-12 <= loads.slowest <= 4 / 3 * best
        assert loads.mean == pytest.approx(costs.sum() / 3)


def test_short_documents_fill_the_gaps() -> None:
    one = Rates(1e-6, 0.0, 0.0, 0.0, 0.0, local_tokens=2**30, overlaps=False)
    batch = BatchDocuments.of([np.array([10_000, 1000, 1000, 1000])])
    loads = RankLoads.of(one, batch, dp=2)
    assert (loads.slowest, loads.mean) == (pytest.approx(0.010), pytest.approx(0.0065))


def test_parts_add_up_and_the_mean_work_does_not_depend_on_dp() -> None:
    time = step_time(JOB, H100, BATCHES)
    assert time.total == pytest.approx(sum(time.parts().values()))
    wider = step_time(replace(JOB, layout=Layout(tp=4, cp=4)), H100, BATCHES)
    assert wider.matmul == pytest.approx(time.matmul)
    assert wider.attention == pytest.approx(time.attention)
    assert wider.imbalance < time.imbalance
    assert wider.optimizer == pytest.approx(time.optimizer), "context-parallel ranks share the optimizer too"
    gathered = step_time(replace(JOB, layout=Layout(tp=4, cp=2, cp_exchange="all_gather")), H100, BATCHES)
    assert gathered.attention == pytest.approx(0.9 * time.attention) and gathered.context > time.context
    assert tokens_per_second_per_gpu(JOB, time) == pytest.approx(16 * 2**19 / 64 / time.total)


def test_full_recompute_costs_a_forward_and_selective_only_the_mlp() -> None:
    cost = {m: rates(replace(JOB, recompute=m), H100) for m in RECOMPUTE_MODES}
    assert cost["none"].attention == cost["selective"].attention < cost["full"].attention
    assert cost["none"].matmul < cost["selective"].matmul < cost["full"].matmul
    kept = cost["all_but_attention"]
    assert (kept.attention, kept.matmul) == (cost["none"].attention, cost["full"].matmul)
    assert kept.context == cost["none"].context < cost["full"].context


def test_copies_to_the_host_hide_behind_long_documents_only() -> None:
    parked = replace(JOB, offload=True, recompute="selective")
    assert step_time(parked, H100, BATCHES).offload == 0
    slow = H100.model_copy(update={"host_bandwidth": H100.host_bandwidth / 20})
    copied = kept_by_chunk(parked, 32, GPU_KERNELS) / slow.host_bandwidth
    time = step_time(parked, slow, BATCHES)
    computed = time.matmul + time.attention + time.elementwise + time.tensor + time.context
    assert time.offload == pytest.approx(2 * copied * parked.micro_batches - computed) and time.offload > 0
    assert step_time(replace(parked, offload=False), slow, BATCHES).offload == 0
    # A copy of half of a micro-batch's time, of half of the layers: the backward hides it, the forward two thirds.
    staged = replace(parked, layout=Layout(tp=4, cp=2, pp=2))
    time = step_time(staged, H100, BATCHES)
    computed = time.matmul + time.attention + time.elementwise + time.tensor + time.context
    bandwidth = kept_by_chunk(staged, 16, GPU_KERNELS) / (computed / staged.micro_batches / 2)
    half = H100.model_copy(update={"host_bandwidth": bandwidth})
    assert step_time(staged, half, BATCHES).offload == pytest.approx(computed / 6)


def test_no_more_is_parked_than_half_of_a_nodes_memory() -> None:
    parked = replace(JOB, offload=True, recompute="none")
    found = evaluate(parked, H100, BATCHES)
    assert found.reason == "out of host memory: parks 318 GB for each GPU, of 125"
    assert parked_bytes(parked, 0) == 32 * kept_by_layer(parked, GPU_KERNELS)
    roomy = H100.model_copy(update={"node_memory_bytes": 8e12})
    assert evaluate(parked, roomy, BATCHES).runs


def test_a_ring_hides_its_exchange_behind_long_documents_only() -> None:
    ring = rates(replace(JOB, layout=Layout(cp=64, cp_exchange="p2p")), H100)
    lengths = np.array([9_000, 524_288])
    assert ring.exchange(lengths)[0] > 0 == ring.exchange(lengths)[1]
    gather = rates(replace(JOB, layout=Layout(cp=64, cp_exchange="all_gather")), H100)
    assert (gather.exchange(lengths) > 0).all()
    assert gather.exchange(np.array([gather.local_tokens]))[0] == 0  # stays on one rank


def test_exchanges_that_transformer_engine_refuses_run_at_pytorchs_speed() -> None:
    """TE refuses all_gather for packed documents, and a2a where key/value heads would have to be repeated."""
    te = replace(JOB, transformer_engine=True)
    for fields, refused in [({}, False), ({"cp_exchange": "a2a"}, False), ({"cp_exchange": "all_gather"}, True),
                            ({"cp_exchange": "a2a", "cp": 4}, True), ({"cp": 1}, False)]:  # fmt: skip
        layout = Layout(**{"tp": 4, "cp": 2, **fields})
        slow = rates(replace(JOB, layout=layout), H100).attention
        assert (rates(replace(te, layout=layout), H100).attention == slow) is refused
        assert rates(replace(te, layout=layout), H100).attention <= slow


def test_the_network_is_slower_than_the_node() -> None:
    assert H100.bandwidth(8, 1) == H100.intra_node_bandwidth * H100.efficiency.network
    assert H100.bandwidth(2, 8) == H100.inter_node_bandwidth * H100.efficiency.network
    assert H100.bandwidth(64, 1) > H100.bandwidth(16, 4) > H100.bandwidth(8, 8)


def test_mfu_is_below_one_and_counts_documents_not_packs() -> None:
    whole = [BatchDocuments.of(single_document(2**19).batch(0, 16))]
    for batches in (BATCHES, whole):
        assert 0.1 < mfu(JOB, H100, step_time(JOB, H100, batches), batches) < 0.6


def test_micro_batches_that_do_not_fill_an_interleaved_schedule_wait() -> None:
    """One micro-batch goes through all chunks of all ranks alone; a whole group of them keeps the ranks busy."""
    job = replace(JOB, layout=Layout(pp=4, virtual_pp=2), world_size=4, sequence_length=2**16)
    times = {}
    for sequences in (1, 4, 5):
        documents = [BatchDocuments.of(single_document(2**16).batch(0, sequences))]
        time = step_time(replace(job, batch_sequences=sequences), H100, documents)
        busy = time.matmul + time.attention + time.elementwise
        times[sequences] = (busy + time.pipeline) / busy * sequences
    assert times == pytest.approx({1: 4, 4: 4 + 3 / 2, 5: 5 + 3 / 2 + 3 / 2}, rel=0.01)


def test_what_a_token_and_a_pair_cost_by_hand() -> None:
    """Three times the forward's products, the output layer on the last stage only, and in bf16 under fp8."""
    flops, lengths = ForwardFlops.of(LLAMA3_8B), np.array([400_000, 1000])
    layers, output, pairs = (
        flops.layers_per_token / 8, flops.output_per_token / 4, flops.attention_per_pair / 8,
    )  # fmt: skip
    bf16, fp8 = H100.matmul_flops("bf16"), H100.matmul_flops("fp8")
    forward, backward = (H100.attention_flops("flash2", one) for one in (False, True))

    def of(cp: int = 2, cp_exchange: str = "all_gather", **fields: str) -> Rates:
        layout = Layout(tp=2, pp=2, cp=cp, cp_exchange=cp_exchange)
        return rates(replace(JOB, layout=layout, **{"recompute": "none", **fields}), H100)

    one = of()
    assert one.matmul == pytest.approx(3 * (layers + output) / bf16)
    assert one.attention == pytest.approx(pairs * (1 / forward + 2.5 / backward))
    linear = one.matmul + one.elementwise + one.tensor + one.context * np.array([1, 0])
    assert one.seconds(lengths) == pytest.approx(linear * lengths + one.attention * lengths**2)
    assert of(precision="fp8").matmul == pytest.approx(3 * (layers / fp8 + output / bf16))
    assert of(recompute="full").matmul == pytest.approx((4 * layers + 3 * output) / bf16)
    assert of(recompute="full").attention == pytest.approx(pairs * (2 / forward + 2.5 / backward))
    ring, alone = of(cp_exchange="p2p"), of(cp=1, cp_exchange="p2p")
    assert ring.attention == pytest.approx(one.attention / 0.9) and ring.overlaps and not one.overlaps
    assert alone.attention == pytest.approx(one.attention * 2) and not alone.overlaps


def test_the_longest_pipeline_stage_is_waited_for() -> None:
    """The last one may have fewer layers to make up for the output layer."""
    flops = ForwardFlops.of(LLAMA3_8B)
    layer, output = 3 * flops.layers_per_token / 32, 3 * flops.output_per_token
    for first, slowest in {16: 16 * layer + output, 17: 15 * layer + output, 18: 18 * layer}.items():
        job = replace(JOB, layout=Layout(pp=2, first_stage_layers=first), recompute="none")
        one = rates(job, H100)
        assert one.matmul * H100.matmul_flops("bf16") == pytest.approx(slowest)
        even = rates(replace(job, layout=Layout(pp=2)), H100)
        assert one.attention == pytest.approx(even.attention * first / 16)


def test_what_a_step_waits_for_by_hand() -> None:
    """Two micro-batches of a document each on tp 2, pp 2, dp 2; links between nodes so slow that nothing hides."""
    slow = H100.model_copy(update={"gpus_per_node": 2, "inter_node_bandwidth": 10e9})
    near, link = (bandwidth * H100.efficiency.network for bandwidth in (H100.intra_node_bandwidth, 10e9))
    memory = H100.memory_bandwidth * H100.efficiency.memory
    job = replace(
        JOB,
        layout=Layout(tp=2, pp=2),
        world_size=8,
        sequence_length=2**14,
        batch_sequences=4,
        recompute="none",
    )
    batches = [BatchDocuments.of(single_document(2**14).batch(0, 4))]
    time, one = step_time(job, slow, batches), rates(job, slow)
    hidden, last = 2**14 * 4096 * 2, sum(stage_weights(job, 1))
    document = one.linear * 2**14 + one.attention * 2**28
    assert time.matmul == pytest.approx(one.matmul * 2**15)
    assert time.attention == pytest.approx(one.attention * 2 * 2**28)
    assert time.tensor == pytest.approx(2 * (16 * 4 * 2 + 2) * hidden / 2 / near)
    # Norms and sums on half of the tokens, 32 query and 8 key heads and the MLP on half of them.
    passes = 10 * hidden / 2 + 2 * 2**14 * (6 * 40 * 128 + 3 * 14336) / 2
    assert time.elementwise == pytest.approx(2 * 3 * passes * 16 / memory)
    assert time.pipeline == pytest.approx(document + 2 * 2 * hidden / 2 / link)
    assert time.gradients == pytest.approx((4 + 2) * last / 2 / link - 0.9 * document)
    assert time.optimizer == pytest.approx((38 / 2 + 4) * last / memory)
    assert time.imbalance == pytest.approx(0) == time.context == time.offload
    assert time.overhead == pytest.approx(0.2 * time.total)
    whole = replace(job, layout=Layout(tp=2, pp=2, distributed_optimizer=False))
    assert step_time(whole, slow, batches).gradients == pytest.approx(8 * last / 2 / link - 0.9 * document)
    assert step_time(whole, slow, batches).optimizer == pytest.approx((38 + 4) * last / memory)
    again = step_time(replace(job, recompute="full"), slow, batches)
    assert again.tensor == pytest.approx(2 * (16 * 4 * 3 + 2) * hidden / 2 / near)
    assert again.elementwise == pytest.approx(4 / 3 * time.elementwise)
    alone = replace(job, layout=Layout(tp=8), batch_sequences=1)
    time = step_time(alone, slow, [BatchDocuments.of(single_document(2**14).batch(0, 1))])
    assert time.gradients == 0 == time.pipeline
    assert time.tensor == pytest.approx((32 * 4 * 2 + 2) * hidden * 7 / 8 / slow.bandwidth(8, 1))


def test_whom_the_ranks_of_an_axis_reach_over_the_network() -> None:
    """Tensor-parallel ranks are neighbours, context-parallel ones next, pipeline stages farthest apart."""
    node = H100.model_copy(update={"gpus_per_node": 4, "inter_node_bandwidth": 10e9})
    link = 10e9 * H100.efficiency.network
    job = replace(JOB, sequence_length=2**14, batch_sequences=4, recompute="none")
    batches = [BatchDocuments.of(single_document(2**14).batch(0, 4))]
    stages = replace(job, layout=Layout(tp=2, pp=2, virtual_pp=2), world_size=8)
    document = float(rates(stages, node).seconds(np.array([2**14]))[0])
    # Both chunks of a rank hand two micro-batches on, forward and back, of half of the tokens.
    handed_over = 2 * 2 * 2 * 2**14 * 4096 * 2 / 2
    assert step_time(stages, node, batches).pipeline == pytest.approx(document / 2 + handed_over / link)
    split = replace(job, layout=Layout(tp=4, cp=2, cp_exchange="all_gather"), world_size=8)
    document = float(rates(split, node).seconds(np.array([2**14]))[0])
    time = step_time(split, node, batches)
    assert time.context == pytest.approx(4 * context_bytes(split) / link) and time.context > 0
    weights = sum(stage_weights(split, 0))
    assert time.gradients == pytest.approx((4 + 2) * weights / 2 / link - 0.9 * document)


def test_the_all_gather_may_be_waited_for_where_the_reduce_scatter_is_not() -> None:
    job = replace(
        JOB,
        layout=Layout(distributed_optimizer=False),
        world_size=2,
        sequence_length=2**14,
        batch_sequences=2,
    )
    batches = [BatchDocuments.of(single_document(2**14).batch(0, 2))]
    document = float(rates(job, H100).seconds(np.array([2**14]))[0])
    # Each takes 45% of the micro-batch's time; the backward hides 60%, the forward 30%.
    bandwidth = 4 * sum(stage_weights(job, 0)) / 2 / (0.45 * document) / H100.efficiency.network
    pair = H100.model_copy(update={"intra_node_bandwidth": bandwidth})
    assert step_time(job, pair, batches).gradients == pytest.approx(0.15 * document)


def test_a_pipeline_fills_with_the_longest_micro_batch() -> None:
    """That of the dearest document, or of as many short ones as all others have."""
    job = replace(JOB, layout=Layout(pp=2), world_size=2, sequence_length=2**14, batch_sequences=4)
    one = rates(job, H100)
    hand_over = 4 * 2 * 2**14 * 4096 * 2 / (H100.intra_node_bandwidth * H100.efficiency.network)
    short = [np.full(16, 2**10)] * 4
    for packs, tokens, pairs in (
        (short, 2**14, 16 * 2**20),
        ([np.array([2**14]), *short[:3]], 2**14, 2**28),
    ):
        time = step_time(job, H100, [BatchDocuments.of(packs)])
        expected = one.linear * tokens + one.attention * pairs
        assert time.pipeline - hand_over == pytest.approx(expected, rel=1e-3)
