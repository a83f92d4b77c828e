"""Build this rank's model chunks, wrapped for data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_prolong.mcore.config import transformer_config
from megatron_prolong.mcore.gpt import LongContextGPT
from megatron_prolong.mcore.groups import connect_delayed_scaling
from megatron_prolong.mcore.offload import HostOffload
from megatron_prolong.recipe.fp8 import Fp8Recipe
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import ModelShape


@dataclass(frozen=True)
class StageModel:
    """This rank's part of the model in one stage.

    Attributes:
        shape: the model, with the stage's RoPE base and length.
        config: Megatron's view of it.
        chunks: one module per virtual pipeline stage, DDP-wrapped when built for training.
        offload: where activations wait for the backward pass, if not on the device.
        keeps_attention: layers are recomputed, but not their attention.
    """

    shape: ModelShape
    config: TransformerConfig
    chunks: list[torch.nn.Module]
    offload: HostOffload | None = None
    keeps_attention: bool = False

    @property
    def bare_chunks(self) -> list[LongContextGPT]:
        """The GPT modules without their DDP and precision wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]

    def zero_gradients(self) -> None:
        """Clear the buffers that gradients accumulate in; the model must be built for training."""
        for chunk in self.chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.zero_grad_buffer()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, gradients add up on this rank; where communication overlaps, the first backward pass after it
        sends them. Otherwise Megatron counts the backward passes of the first step and sends after that many in
        every other one, but the number of micro-batches differs from step to step and from rank to rank.
        """
        with ExitStack() as stack:
            for chunk in self.chunks:
                if isinstance(chunk, DistributedDataParallel):
                    stack.enter_context(chunk.no_sync())
            yield

    def gather_weights(self) -> None:
        """Complete the last update on this rank: overlapped, the shards that other ranks updated come only with the
        next forward pass, and until then weights are a step old here. Collective.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
                # What the next forward pass would do: the transposes for the backward are made of what arrived.
                post_all_gather_processing([w for w in chunk.parameters() if is_float8tensor(w)])


def build_model(
    shape: ModelShape,
    layout: Layout,
    *,
    precision: str,
    recompute: str = "none",
    fp8_recipe: Fp8Recipe = "tensorwise",
    fp8_parameters: bool = False,
    loss_chunk_tokens: int = 2048,
    offload_activations: bool = False,
    rank_tokens: int = 0,
    training: bool = True,
) -> StageModel:
    """Build the chunks this pipeline rank owns; weights are zeros until a checkpoint is loaded.

    Args:
        shape: model shape; its `rope_base` is the base used.
        rank_tokens: as transformer_config's.
        training: wrap in Megatron's DistributedDataParallel (gradients accumulate and reduce in fp32).
    """
    config = transformer_config(
        shape,
        layout,
        precision=precision,
        recompute=recompute,
        fp8_recipe=fp8_recipe,
        fp8_parameters=fp8_parameters,
        rank_tokens=rank_tokens,
    )
    stages = range(layout.virtual_pp) if layout.virtual_pp > 1 else [None]
    chunks = [_build_chunk(config, shape, loss_chunk_tokens, vp_stage) for vp_stage in stages]
    if training:
        if precision == "fp8" and fp8_recipe == "delayed":
            connect_delayed_scaling()
        chunks = [_wrap_ddp(config, layout, chunk, index) for index, chunk in enumerate(chunks)]
    offload = HostOffload(chunks) if offload_activations else None
    return StageModel(shape, config, chunks, offload, keeps_attention=recompute == "all_but_attention")


def _build_chunk(
    config: TransformerConfig, shape: ModelShape, loss_chunk_tokens: int, vp_stage: int | None
) -> torch.nn.Module:
    chunk = LongContextGPT(
        config,
        shape,
        loss_chunk_tokens=loss_chunk_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )
    with torch.no_grad():
        for param in chunk.parameters():
            if not is_float8tensor(param):
                param.zero_()  # rows that pad the vocabulary are in no checkpoint and must not be garbage
    if torch.cuda.is_available():
        chunk.cuda(torch.cuda.current_device())
    return Float16Module(config, chunk) if config.bf16 else chunk


def _wrap_ddp(
    config: TransformerConfig, layout: Layout, chunk: torch.nn.Module, index: int
) -> torch.nn.Module:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        fp8_param_gather=bool(config.fp8_param),
        overlap_grad_reduce=True,
        overlap_param_gather=layout.distributed_optimizer,
    )
    # Megatron buckets the first chunk only: later ones have no computation left to overlap with.
    return DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)


def unwrap(chunk: torch.nn.Module) -> LongContextGPT:
    """The GPT module inside DDP and Float16Module."""
    while not isinstance(chunk, LongContextGPT):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
