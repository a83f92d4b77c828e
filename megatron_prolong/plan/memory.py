"""Bytes that each rank holds, part by part.

Persistent, from the first step on (P = weights of this rank, e = bytes of a weight, D = dp·cp):
- parameters e·P, and 2 more for each weight of an fp8 layer, which Transformer Engine keeps in fp8 and transposed
  (instead of in bf16 with fp8_parameters); gradients 4·P (accumulated and reduced in fp32);
- optimizer: Adam's two fp32 moments, and an fp32 copy of the weights unless they are fp32 already: 12·P in
  bf16, 8·P in fp32, divided by D with the distributed optimizer (ZeRO-1).
  With it Megatron keeps weights and gradients in one buffer in which every weight starts at a multiple of 64
  elements and the whole is padded to a multiple of lcm(D, 128): that padding is counted too.

Activations, saved from forward to backward, per micro-batch in flight (see `saved_by_layer`, `in_flight`).
Working memory: what exists only while one layer (or one chunk of the loss) runs. Exchange: buffers of
collectives that do not overlap with the above.

Everything here is what the program allocates; the caching allocator's fragmentation, the CUDA context and
NCCL's own buffers are in the hardware table, because they belong to the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_prolong.plan.job import Job
from megatron_prolong.plan.weights import buffer_elements, fp8_weights, optimizer_bytes, stage_weights
from megatron_prolong.recipe.counts import layer_weights
from megatron_prolong.recipe.layout_rules import head_ranks, kv_repeats
from megatron_prolong.recipe.schema import recomputes_every_layer


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the step's peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    exchange: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name → bytes, in the order of the fields."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Kernels:
    """Which operations are one kernel that keeps no intermediate result for the backward.

    Attributes:
        swiglu: silu(gate)·up; otherwise silu(gate) and a copy of up are kept as well.
        rope: rotary embedding; otherwise cos and sin are kept, for queries and for keys.
        norm: RMSNorm; otherwise its input and the normalised input are kept in fp32.
        norm_in_mlp: the MLP's norm is part of it and recomputed with it.
        backward: whose attention backward has buffers of its own, "flash2", "flash3" or "te", which is cuDNN's (see
            `attention_gradients`).
    """

    swiglu: bool = True
    rope: bool = False
    norm: bool = True
    norm_in_mlp: bool = False
    backward: str = ""


GPU_KERNELS = Kernels(backward="flash2")
TRANSFORMER_ENGINE = Kernels(rope=True, norm_in_mlp=True, backward="te")
CPU_KERNELS = Kernels(swiglu=False, rope=False, norm=False)


def gpu_kernels(job: Job) -> Kernels:
    """What the job's layers are made of on a GPU."""
    layers = TRANSFORMER_ENGINE if job.transformer_engine else GPU_KERNELS
    return replace(layers, backward=job.long_attention)


def rank_memory(job: Job, pp_rank: int, kernels: Kernels | None = None) -> RankMemory:
    """Memory of a rank of pipeline stage `pp_rank`, the same for all its tp, cp and dp ranks.

    Args:
        kernels: by default what the job has on a GPU.
    """
    kernels = kernels or gpu_kernels(job)
    weights = stage_weights(job, pp_rank)
    elements = buffer_elements(job, weights)
    has_loss = pp_rank == job.layout.pp - 1
    working = max(layer_working(job, kernels), loss_working(job) if has_loss else 0)
    return RankMemory(
        parameters=elements * job.element_bytes
        + (0 if job.fp8_parameters else 2 * fp8_weights(job, pp_rank)),
        gradients=elements * 4,
        optimizer=optimizer_bytes(job, elements),
        activations=activation_bytes(job, pp_rank, kernels),
        working=working,
        exchange=hand_over_bytes(job)
        + max(attention_backward(job, kernels) + exchange_bytes(job) - working, 0),
    )


def peak_memory(job: Job) -> RankMemory:
    """Memory of the fullest pipeline stage, on a GPU."""
    return max((rank_memory(job, rank) for rank in range(job.layout.pp)), key=lambda m: m.total)


# --- activations --------------------------------------------------------------------------------------------


def saved_by_layer(job: Job, kernels: Kernels, fp8: bool = False) -> dict[str, int]:
    """Bytes that the backward of one layer needs, for one micro-batch, by tensor.

    t tokens of the rank, s of its residual stream (t/tp with sequence parallelism), h hidden, f ffn, N query
    and G key/value heads of size d, e bytes per element. `input` is the residual stream itself. Attention keeps
    rotated queries and keys, values, its output and one fp32 log-sum-exp per head and token, never scores.

    Args:
        fp8: a layer whose products are in fp8 keeps what norms and activation hand them in fp8.
    """
    shape, tp, e = job.shape, job.layout.tp, job.element_bytes
    t, s = job.rank_tokens, job.residual_tokens
    h, f, d = shape.hidden_size, shape.ffn_hidden_size // tp, shape.head_dim
    heads, groups = shape.num_heads // tp, shape.num_kv_heads // tp
    norm_input = e if kernels.norm else 4
    product = 1 if fp8 else e
    saved = {
        "input": s * h * norm_input,
        "norm_attention": s * h * product + s * 4,
        "values": t * groups * d * e,
        "rotated": t * (heads + groups) * d * e,
        "attention": t * heads * d * e + t * heads * 4,
        "residual": s * h * norm_input,
        "norm_mlp": s * h * product + s * 4,
        "fc1": t * 2 * f * e,
        "activation": t * f * product,
    }
    if job.layout.cp > 1 and job.layout.cp_exchange.startswith("a2a"):
        # What was exchanged is kept by heads, and the output a second time.
        repeated = groups * a2a_repeats(job)
        saved["values"] = t * repeated * d * e
        saved["rotated"] = t * (heads + repeated) * d * e
        saved["attention"] += t * heads * d * e
    elif job.layout.cp > 1 and job.mixed:
        saved["attention"] += t * heads * d * e  # the two outputs joined are a copy, and each is kept
    if not kernels.rope:
        saved["cos_sin"] = 4 * t * d * e
    if not kernels.norm:
        saved["normalised"] = 2 * s * h * 4
    if not kernels.swiglu:
        saved["silu"] = 2 * t * f * e
    return saved


_PROCESSORS = 132  # streaming multiprocessors of an H100 or H200
_RECOMPUTED_MLP = ("fc1", "silu", "activation")


def kept_by_chunk(job: Job, num_layers: int, kernels: Kernels) -> int:
    """Bytes that a model chunk's layers keep from forward to backward, for one micro-batch."""
    recomputed = job.recomputed_layers(num_layers)
    whole = num_layers - recomputed
    fp8 = max(whole - 2, 0) if job.precision == "fp8" else 0  # the model's first and last layer are in bf16
    kept = (
        recomputed * kept_by_recomputed_layer(job, kernels)
        + (whole - fp8) * kept_by_layer(job, kernels)
        + fp8 * kept_by_layer(job, kernels, fp8=True)
    )
    return kept + rotary_bytes(job) if recomputed else kept


def kept_by_recomputed_layer(job: Job, kernels: Kernels) -> int:
    """Its input, and with all_but_attention what `kept_attention` says."""
    return job.residual_bytes + kept_attention(job, kernels)


def kept_attention(job: Job, kernels: Kernels) -> int:
    """What a recomputed layer keeps of its attention: the output, and inputs that an exchange made copies of."""
    if job.recompute != "all_but_attention":
        return 0
    layout = job.layout
    saved = saved_by_layer(replace(job, mixed=False), kernels)  # the two outputs are joined only when needed
    copied = 0
    if layout.cp > 1 and layout.cp_exchange.startswith("a2a"):
        copied = saved["values"] + saved["rotated"]
    elif layout.cp > 1 and layout.cp_exchange == "p2p" and job.transformer_engine:
        copied = 2 * saved["values"]  # TE's ring joins keys and values
    return saved["attention"] + copied


def kept_by_layer(job: Job, kernels: Kernels, fp8: bool = False) -> int:
    """Bytes that one layer keeps, for one micro-batch; with block:N, one behind the first N."""
    if recomputes_every_layer(job.recompute):
        return kept_by_recomputed_layer(job, kernels)
    saved = saved_by_layer(job, kernels, fp8)
    if job.recompute == "selective":
        again = (*_RECOMPUTED_MLP, "norm_mlp") if kernels.norm_in_mlp else _RECOMPUTED_MLP
        return sum(size for name, size in saved.items() if name not in again)
    return sum(saved.values())


def in_flight(job: Job, pp_rank: int) -> int:
    """Model chunks whose forward is done and backward is not, at most, on pipeline stage `pp_rank`.

    1F1B: stage p runs pp-p-1 forwards ahead. Interleaved: 2·(pp-p-1) + (v-1)·pp chunks ahead
    (megatron.core.pipeline_parallel.schedules).
    """
    pp, v = job.layout.pp, job.layout.virtual_pp
    ahead = pp - pp_rank - 1 if v == 1 else 2 * (pp - pp_rank - 1) + (v - 1) * pp
    return min(ahead + 1, job.micro_batches * v)


def activation_bytes(job: Job, pp_rank: int, kernels: Kernels) -> int:
    """Bytes held for the backward at the peak of a step on pipeline stage `pp_rank`."""
    chunks, is_last = in_flight(job, pp_rank), pp_rank == job.layout.pp - 1
    chunk_layers = job.stage_layers[pp_rank] // job.layout.virtual_pp
    kept = chunks * kept_by_chunk(job, chunk_layers, kernels)
    if job.offload:  # all but the layer being copied out (or in) and its neighbour
        kept += parkable_by_chunk(job, min(chunk_layers, 2), kernels) - parked_bytes(job, pp_rank, kernels)
    inputs = 3 * 8 * job.rank_tokens * job.micro_batches  # tokens, labels, positions: int64
    return kept + output_bytes(job, pp_rank) + inputs + (loss_bytes(job, kernels) if is_last else 0)


def output_bytes(job: Job, pp_rank: int) -> int:
    """Outputs of a pipeline stage: one until the next stage has it; interleaved, those of all chunks in flight
    (`deallocate_pipeline_outputs` in mcore/config.py). The model's last chunk has a loss instead."""
    held = in_flight(job, pp_rank) if job.layout.virtual_pp > 1 else 1
    is_last = pp_rank == job.layout.pp - 1
    return (held - is_last) * job.residual_bytes


def parkable_by_chunk(job: Job, num_layers: int, kernels: Kernels) -> int:
    """What of `kept_by_chunk` can wait in host memory: not attention's outputs of recomputed layers."""
    stays = job.recomputed_layers(num_layers) * kept_attention(job, kernels)
    return kept_by_chunk(job, num_layers, kernels) - stays


def parked_bytes(job: Job, pp_rank: int, kernels: Kernels | None = None) -> int:
    """What waits in host memory for the backward at the peak of a step, with offload."""
    if not job.offload:
        return 0
    chunk_layers = job.stage_layers[pp_rank] // job.layout.virtual_pp
    return in_flight(job, pp_rank) * parkable_by_chunk(job, chunk_layers, kernels or gpu_kernels(job))


def rotary_bytes(job: Job) -> int:
    """The fp32 angles of a micro-batch: an argument of every recomputed layer, shared by them."""
    return job.rank_tokens * job.shape.head_dim * 4


def loss_bytes(job: Job, kernels: Kernels) -> int:
    """Saved by final norm, output layer and loss: no logits. The loss is one micro-batch at a time.

    Of all the rank's hidden states the gradient is saved, made in the forward.
    """
    s, h = job.residual_tokens, job.shape.hidden_size
    norm = job.residual_bytes + s * 4 if kernels.norm else 2 * s * h * 4 + s * 4
    return norm + job.hidden_bytes


# --- working memory -----------------------------------------------------------------------------------------


def layer_working(job: Job, kernels: Kernels) -> int:
    """While one layer runs backward, without a context-parallel exchange: its MLP first, then its attention."""
    mlp = recomputed_bytes(job, kernels) + job.residual_bytes + mlp_gradients(job)
    return max(mlp, attention_backward(job, kernels))


def attention_backward(job: Job, kernels: Kernels) -> int:
    """While a layer's attention runs backward; what its MLP kept is free by then."""
    saved = saved_by_layer(job, kernels)
    freed = sum(saved.get(name, 0) for name in _RECOMPUTED_MLP)
    gradients = attention_gradients(job, kernels) + passing_gradients(job)
    return recomputed_bytes(job, kernels) - freed + gradients


def recomputed_bytes(job: Job, kernels: Kernels) -> int:
    """What one layer keeps for its backward only once that has begun.

    Of a block:N nothing at the peak: the layers behind it kept everything, and are through when it is recomputed.
    """
    if 0 < job.recomputed_share < 1 and not job.offload:
        return 0
    recomputed = job.recomputed_share > 0
    kept = kept_by_recomputed_layer(job, kernels) if recomputed else kept_by_layer(job, kernels)
    return sum(saved_by_layer(job, kernels).values()) - kept


def passing_gradients(job: Job) -> int:
    """Gradients of the residual stream, gathered over the tensor-parallel ranks, and of the largest weight."""
    weight_gradient = max(layer_weights(job.shape, job.layout.tp).values()) * job.element_bytes
    return job.residual_bytes + 2 * gathered_bytes(job) + weight_gradient


def mlp_gradients(job: Job) -> int:
    """What the MLP's backward adds, at the larger of two moments.

    fc2's: the gradients of the activation and of the weight and, with sequence parallelism, a gathered gradient
    and Megatron's buffer for gathered inputs. SwiGLU's: the gradients of the activation and of fc1's output, in
    place of the activation, which fc2 has used, and that buffer.
    """
    activation = job.rank_tokens * job.shape.ffn_hidden_size // job.layout.tp * job.element_bytes
    gathered = gathered_bytes(job)
    fc2 = activation + 2 * gathered + layer_weights(job.shape, job.layout.tp)["fc2"] * job.element_bytes
    return max(fc2, 2 * activation + gathered)


def gathered_bytes(job: Job) -> int:
    """The residual stream gathered over the tensor-parallel ranks; nothing without sequence parallelism."""
    return job.hidden_bytes if job.residual_tokens < job.rank_tokens else 0


def attention_gradients(job: Job, kernels: Kernels) -> int:
    """Gradients of attention's output, queries, keys and values, and of the packed projections.

    All kernels sum those of queries in fp32. cuDNN and FlashAttention-2 make those of keys and values for every
    query head and add up the heads of a group: cuDNN from fp32 (cudnn-frontend,
    scaled_dot_product_flash_attention.h: dK_fullhead_size), FlashAttention-2 in a buffer in fp32 beyond 2 GiB.
    FlashAttention-3 sums the group in fp32 (flash_api.cpp: dk_accum). With all_gather they are those of the whole
    sequence.
    """
    shape, tp, e = job.shape, job.layout.tp, job.element_bytes
    heads = 2 * (shape.num_heads + shape.num_kv_heads)
    gradients = job.rank_tokens * heads * shape.head_dim // tp * e
    queries = job.rank_tokens * shape.num_heads * shape.head_dim // tp
    if not kernels.backward:
        return gradients
    if kernels.backward == "te":
        return gradients + 3 * queries * 4
    gathered = job.layout.cp if job.layout.cp_exchange == "all_gather" else 1
    keys = gathered * job.rank_tokens * shape.num_kv_heads * shape.head_dim // tp
    if kernels.backward == "flash3":
        return gradients + queries * 4 + 2 * keys * 4
    expanded = gathered * queries * e
    return gradients + query_sums(job) * queries * 4 + 2 * expanded + (keys * 4 if expanded >= 2**31 else 0)


def query_sums(job: Job) -> int:
    """In how many parts FlashAttention-2 sums the gradient of the queries of one long document: where the order
    counts, as many as give every processor a sum of its own (flash_api.cpp: nsplits)."""
    if not job.deterministic:
        return 1
    heads = job.shape.num_heads // job.layout.tp // head_ranks(job.layout.cp_exchange, job.layout.cp)
    return -(-_PROCESSORS // heads)


def loss_working(job: Job) -> int:
    """The weight's fp32 gradient, and with it one chunk's logits and all hidden states, or its copy in e bytes."""
    chunk = min(job.loss_chunk_tokens, job.rank_tokens)
    e, h = job.element_bytes, job.shape.hidden_size
    logits = chunk * job.vocab_rows * (4 if job.precision == "fp32" else 4 + e)
    copied = 0 if job.precision == "fp32" else job.vocab_rows * h * e
    return job.vocab_rows * h * 4 + max(logits + job.hidden_bytes, copied)


def hand_over_bytes(job: Job) -> int:
    """Of a pipeline: what arrives and what is sent."""
    return 2 * job.residual_bytes if job.layout.pp > 1 else 0


def exchange_bytes(job: Job) -> int:
    """Buffers of the context-parallel exchange of one layer's backward.

    As `model/context_parallel.py` has them (gradients of keys and values travel in fp32):
    - all_gather: keys and values of the whole sequence, their gradients in fp32, and what a call of the kernel
      returns: gradients of queries, keys and values;
    - p2p: keys and values at hand, arriving and their gradients, at hand, sent and arriving; fp32 gradient of
      the queries;
    - a2a: queries, keys, values, output and the gradients of these once more, by heads.
    """
    shape, layout, e = job.shape, job.layout, job.element_bytes
    if layout.cp == 1:
        return 0
    t = job.rank_tokens
    queries = t * shape.num_heads * shape.head_dim // layout.tp
    keys_values = 2 * t * shape.num_kv_heads * shape.head_dim // layout.tp
    if layout.cp_exchange == "all_gather":
        whole = layout.cp * keys_values
        return whole * (e + 4) + (queries + whole) * e
    if "p2p" in layout.cp_exchange:
        return keys_values * (3 * e + 3 * 4) + queries * (4 + e)
    return 2 * e * (2 * queries + a2a_repeats(job) * keys_values)


def a2a_repeats(job: Job) -> int:
    """How often the exchange repeats key/value heads."""
    return kv_repeats(job.layout.cp_exchange, job.layout.cp, job.shape.num_kv_heads // job.layout.tp)
