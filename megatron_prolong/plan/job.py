"""What the planner is asked about: one stage of one model at one layout on one number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_prolong.recipe.counts import padded_vocab_size
from megatron_prolong.recipe.fp8 import Fp8Recipe
from megatron_prolong.recipe.layout_rules import te_exchanges
from megatron_prolong.recipe.schema import (
    Layout,
    Precision,
    Recipe,
    Recompute,
    Stage,
    recomputes_every_layer,
    settings_of,
)
from megatron_prolong.recipe.shape import ModelShape


@dataclass(frozen=True)
class Job:
    """One stage at one layout.

    A micro-batch is `micro_batch_tokens` (one packed sequence by default), spread over the layout's
    context-parallel ranks.

    Attributes:
        shape: the model.
        layout: how one copy of it is spread.
        world_size: ranks in all; dp = world_size / (tp·pp·cp).
        sequence_length: tokens of a packed sequence.
        batch_sequences: packed sequences of a global batch.
        precision: "fp32", "bf16" or "fp8" (bf16 weights, fp8 matrix products).
        recompute: "none", "selective" (the MLP), "all_but_attention", "full" (every layer) or "block:N" (N of each
            chunk's layers).
        offload: activations wait for the backward pass in host memory.
        loss_chunk_tokens: tokens whose logits exist at once.
        micro_batch_tokens: tokens that one data-parallel rank holds at a time; None for sequence_length.
        fp8_recipe: which GPUs and layouts can do it is in recipe/fp8.py; the prediction does not depend on it.
        fp8_parameters: weights of fp8 layers are kept in fp8 only.
        transformer_engine: the layers are Transformer Engine's, which keep less for the backward, and attend with
            its kernels.
        flash: what is behind PyTorch's flash attention: its own FlashAttention-2 ("flash2") or "flash3".
        deterministic: PyTorch attends in TE's place, and FlashAttention-2 keeps partial sums apart.
        mixed: micro-batches hold both documents that are split over context-parallel ranks and whole ones. True by
            default: training chooses for each micro-batch which are split, and the fullest one counts.
    """

    shape: ModelShape
    layout: Layout
    world_size: int
    sequence_length: int
    batch_sequences: int
    precision: Precision = "bf16"
    recompute: Recompute = "full"
    offload: bool = False
    loss_chunk_tokens: int = 2048
    micro_batch_tokens: int | None = None
    fp8_recipe: Fp8Recipe = "tensorwise"
    fp8_parameters: bool = False
    transformer_engine: bool = False
    flash: str = "flash2"
    deterministic: bool = False
    mixed: bool = True

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.layout.model_ranks

    @property
    def micro_batch_length(self) -> int:
        """Tokens of a micro-batch, over its context-parallel ranks."""
        return self.micro_batch_tokens or self.sequence_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches per data-parallel rank and step, rounded up."""
        return -(-self.batch_tokens // (self.dp * self.micro_batch_length))

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.batch_sequences * self.sequence_length

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch that one context-parallel rank holds."""
        return -(-self.micro_batch_length // self.layout.cp)

    @property
    def residual_tokens(self) -> int:
        """Tokens of a micro-batch whose residual stream this rank holds: fewer with sequence parallelism."""
        tp = self.layout.tp
        return -(-self.rank_tokens // tp) if self.layout.sequence_parallel and tp > 1 else self.rank_tokens

    @property
    def residual_bytes(self) -> int:
        """Bytes of that residual stream."""
        return self.residual_tokens * self.shape.hidden_size * self.element_bytes

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all `rank_tokens`."""
        return self.rank_tokens * self.shape.hidden_size * self.element_bytes

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each pipeline stage. A search asks for them millions of times."""
        stages = self.layout.stage_layers(self.shape.num_layers)
        assert stages is not None, "the layout was checked"
        return stages

    @property
    def longest_stage_layers(self) -> int:
        """Layers of the pipeline stage that has most."""
        return max(self.stage_layers)

    def recomputed_layers(self, chunk_layers: int) -> int:
        """How many of a model chunk's layers are recomputed whole."""
        if recomputes_every_layer(self.recompute):
            return chunk_layers
        if self.recompute.startswith("block:"):
            return min(int(self.recompute.removeprefix("block:")), chunk_layers)
        return 0

    @property
    def recomputed_share(self) -> float:
        """Share of the longest stage's layers that are recomputed whole."""
        chunk_layers = self.longest_stage_layers // self.layout.virtual_pp
        return self.recomputed_layers(chunk_layers) / chunk_layers

    @property
    def exchanged_again(self) -> float:
        """Share of a forward's tensor-parallel exchange that recomputation repeats: half of it is the MLP's."""
        return 0.5 if self.recompute == "selective" else self.recomputed_share

    @property
    def attention_again(self) -> float:
        """Share of the longest stage's layers whose attention is computed twice."""
        return 0.0 if self.recompute == "all_but_attention" else self.recomputed_share

    @property
    def attention(self) -> str:
        """Kernels of the layers' attention: a field of the hardware table's `efficiency`."""
        return "te" if self.transformer_engine and not self.deterministic else self.flash

    @property
    def long_attention(self) -> str:
        """`attention` for documents that are split over context-parallel ranks: PyTorch's where Transformer Engine
        refuses the exchange."""
        layout = self.layout
        refused = layout.cp > 1 and not te_exchanges(
            layout.cp_exchange, layout.cp, self.shape.num_kv_heads // layout.tp
        )
        return self.flash if refused else self.attention

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding (and of the output layer) on one tensor-parallel rank, padding included."""
        return padded_vocab_size(self.shape.vocab_size, self.layout.tp) // self.layout.tp


def job_of(
    recipe: Recipe,
    stage: Stage,
    shape: ModelShape,
    world_size: int,
    *,
    transformer_engine: bool,
    flash: str = "flash2",
) -> Job:
    """The stage as the recipe has it.

    Args:
        transformer_engine: it is there; fp8 needs it in any case.
        flash: what is behind PyTorch's flash attention, "flash2" or "flash3".
    """
    layout, precision, recompute, offload = settings_of(recipe, stage)
    return Job(
        shape=shape,
        layout=layout,
        world_size=world_size,
        sequence_length=stage.sequence_length,
        batch_sequences=stage.batch_sequences,
        precision=precision,
        recompute=recompute,
        offload=offload,
        loss_chunk_tokens=recipe.loss_chunk_tokens,
        micro_batch_tokens=stage.micro_batch_tokens,
        fp8_recipe=recipe.fp8_recipe,
        fp8_parameters=recipe.fp8_parameters and precision == "fp8",
        transformer_engine=transformer_engine or precision == "fp8",
        flash=flash,
        deterministic=recipe.deterministic,
    )
