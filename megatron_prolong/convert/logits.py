"""A second opinion on a conversion: logits of the Megatron side in plain torch against transformers' own.

`megatron_logits` reads the checkpoint a layer at a time in Megatron's own arrangement (grouped QKV, gate and up in
one matrix) and knows nothing of the mapping table, so a wrong table, RoPE base or scaling shows up as wrong logits.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_prolong.convert.checkpoint import MegatronCheckpoint, open_weights
from megatron_prolong.convert.dist_weights import DistWeights
from megatron_prolong.convert.names import LAYERS, Rows, hf_tensors, rules
from megatron_prolong.model.rope import inverse_frequencies
from megatron_prolong.recipe.shape import ModelShape, read_shape

NUM_TOKENS = 2048
_QKV, _FC1 = f"{LAYERS}self_attention.linear_qkv", f"{LAYERS}mlp.linear_fc1"


def largest_logit_difference(hf_dir: Path, checkpoint: Path) -> float | None:
    """Largest difference of any logit over random tokens, relative to the largest logit; both computed in fp32.

    Returns:
        None when transformers' model, or the logits, would not fit into memory.
    """
    shape = read_shape(hf_dir)
    num_tokens = min(NUM_TOKENS, shape.max_length)
    needed = 4 * (sum(tensor.numel for tensor in hf_tensors(shape)) + 4 * num_tokens * shape.vocab_size)
    if needed > 0.8 * psutil.virtual_memory().available:
        return None
    tokens_T = torch.randint(shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    expected = _transformers_logits(hf_dir, tokens_T)
    found = megatron_logits(checkpoint, tokens_T, sidecar=hf_dir)
    return float((found - expected).abs().max() / expected.abs().max())


def _transformers_logits(hf_dir: Path, tokens_T: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens_T[None], use_cache=False).logits[0]


@torch.inference_mode()
def megatron_logits(checkpoint: Path, tokens_T: Tensor, sidecar: Path | None = None) -> Tensor:
    """Logits [T, vocabulary], fp32, of one document; holds one layer of the model at a time."""
    opened = MegatronCheckpoint.open(checkpoint, sidecar)
    shape = opened.shape
    with contextlib.closing(open_weights(opened)) as weights:
        embedding = _read(weights, shape, "embedding.word_embeddings.weight", None)
        hidden_TH = F.embedding(tokens_T, embedding)
        if not shape.tie_embeddings:
            del embedding
        for layer in range(shape.num_layers):
            hidden_TH = _layer(hidden_TH, weights, shape, layer)
        final = _read(weights, shape, "decoder.final_layernorm.weight", None)
        hidden_TH = F.rms_norm(hidden_TH, final.shape, final, shape.norm_eps)
        head = embedding if shape.tie_embeddings else _read(weights, shape, "output_layer.weight", None)
        return hidden_TH @ head.T


def _layer(hidden_TH: Tensor, weights: DistWeights, shape: ModelShape, layer: int) -> Tensor:
    norm = _read(weights, shape, f"{_QKV}.layer_norm_weight", layer)
    normed_TH = F.rms_norm(hidden_TH, norm.shape, norm, shape.norm_eps)
    mixed = normed_TH @ _read(weights, shape, f"{_QKV}.weight", layer).T
    # [T, groups, query heads of the group + key + value, head_dim]
    mixed = mixed.view(len(hidden_TH), shape.num_kv_heads, -1, shape.head_dim)
    q, k, v = mixed.split([shape.num_heads // shape.num_kv_heads, 1, 1], dim=2)
    q, k, v = (part.flatten(1, 2).transpose(0, 1) for part in (q, k, v))  # [heads, T, head_dim]
    context = F.scaled_dot_product_attention(
        _rotate(q, shape)[None], _rotate(k, shape)[None], v[None],
        is_causal=True, enable_gqa=True, scale=shape.softmax_scale,
    )[0]  # fmt: skip
    projection = _read(weights, shape, f"{LAYERS}self_attention.linear_proj.weight", layer)
    hidden_TH = hidden_TH + context.transpose(0, 1).flatten(1) @ projection.T
    norm = _read(weights, shape, f"{_FC1}.layer_norm_weight", layer)
    normed_TH = F.rms_norm(hidden_TH, norm.shape, norm, shape.norm_eps)
    gate, up = (normed_TH @ _read(weights, shape, f"{_FC1}.weight", layer).T).chunk(2, dim=-1)
    down = _read(weights, shape, f"{LAYERS}mlp.linear_fc2.weight", layer)
    return hidden_TH + (F.silu(gate) * up) @ down.T


def _rotate(x_NTD: Tensor, shape: ModelShape) -> Tensor:
    frequencies = inverse_frequencies(shape.head_dim, shape.rope_base, shape.rope_scaling)
    angles_TD = torch.outer(torch.arange(x_NTD.shape[1], dtype=torch.float32), frequencies).repeat(1, 2)
    first, second = x_NTD.chunk(2, dim=-1)
    return x_NTD * angles_TD.cos() + torch.cat((-second, first), dim=-1) * angles_TD.sin()


def _read(weights: DistWeights, shape: ModelShape, key: str, layer: int | None) -> Tensor:
    """A whole Megatron tensor of one layer, in fp32."""
    (rule,) = [rule for rule in rules(shape) if rule.key == key]
    rows = Rows(key, layer, 0, rule.rows)
    out = torch.empty(rule.shape, dtype=weights.dtype(rows))
    weights.read_into(rows, out)
    return out.float()
