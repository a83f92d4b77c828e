"""GPTModel with positions of our own and a loss that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron_prolong.mcore.attention import Documents
from megatron_prolong.mcore.specs import block_spec
from megatron_prolong.model.cross_entropy import VocabularyShard, cross_entropy_sum, token_losses
from megatron_prolong.model.rope import angles, inverse_frequencies
from megatron_prolong.recipe.counts import padded_vocab_size
from megatron_prolong.recipe.shape import ModelShape


class LongContextGPT(GPTModel):
    """Megatron's GPTModel for Llama shapes and packed documents.

    Two things differ from the parent. Rotary angles are looked up from the position of every token, so that they
    restart at each document and are right for any context-parallel slice. And with labels, output layer and
    cross-entropy run together in chunks over tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        loss_chunk_tokens: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, get_num_layers_to_build(config, vp_stage=vp_stage)),
            vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.real_vocab_size = shape.vocab_size
        self.loss_chunk_tokens = loss_chunk_tokens
        # Plain attribute, not a buffer: the base belongs to the stage, never to a checkpoint. On the device from
        # the start: a copy in each forward pass would wait until the GPU has done all that is queued.
        frequencies = inverse_frequencies(shape.head_dim, shape.rope_base, shape.rope_scaling)
        self.inverse_frequencies = frequencies.to(torch.cuda.current_device())

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, **kwargs)
        return (decoder_input, angles(position_ids[0], self.inverse_frequencies), *rest)

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """With labels the sum of the token losses, or without gradients each of them: [1, T] fp32, 0 where the
        label is -100. Otherwise hidden states or logits.

        When generating, logits are those of each document's last token only: [1, D, V].
        """
        if labels is None or not self.post_process:
            documents = kwargs.get("packed_seq_params")
            if self.post_process and isinstance(documents, Documents) and documents.caches is not None:
                hidden_states = hidden_states[[end - 1 for end in documents.cu_seqlens[1:]]]
            return super()._postprocess(hidden_states, labels=None, **kwargs)
        weight = self._output_weight()
        hidden_TH = self._for_parallel_output(hidden_states)[:, 0]
        group = self.pg_collection.tp
        shard = VocabularyShard(
            start=len(weight) * torch.distributed.get_rank(group),
            real_size=self.real_vocab_size,
            group=group,
        )
        if torch.is_grad_enabled():
            return cross_entropy_sum(hidden_TH, weight, labels[0], shard, self.loss_chunk_tokens)
        return token_losses(hidden_TH, weight, labels[0], shard, self.loss_chunk_tokens).unsqueeze(0)

    def _output_weight(self) -> Tensor:
        """Weight of the output layer, with its last update complete on this rank.

        Megatron waits for the gather of updated weights in a hook before a layer is called; the loss takes the
        weight without calling the layer, so it calls the hook.
        """
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _for_parallel_output(self, hidden_states: Tensor) -> Tensor:
        """All tokens on every tensor-parallel rank; backward sums the ranks' partial gradients."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
