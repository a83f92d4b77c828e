"""The arithmetic of a Llama: the weights of its layers, and the floating-point operations on them.

A product of [m,k] by [k,n] is 2·m·k·n. Causal attention over a document of n tokens is two products over n²/2
pairs: 2·n²·(heads·head size) forward. Norms, activations and the embedding's lookup are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prolong.recipe.shape import ModelShape

_VOCAB_MULTIPLE = 128  # Megatron's own default (arguments.py --make-vocab-size-divisible-by)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def layer_weights(shape: ModelShape, tp: int) -> dict[str, int]:
    """Elements of each weight of one layer on one tensor-parallel rank."""
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return {
        "norm_attention": shape.hidden_size,
        "qkv": heads // tp * shape.hidden_size,
        "proj": shape.num_heads * shape.head_dim // tp * shape.hidden_size,
        "norm_mlp": shape.hidden_size,
        "fc1": 2 * shape.ffn_hidden_size // tp * shape.hidden_size,
        "fc2": shape.ffn_hidden_size // tp * shape.hidden_size,
    }


def num_parameters(shape: ModelShape) -> int:
    """Weights of the whole model, with the real vocabulary."""
    vocabularies = 1 if shape.tie_embeddings else 2
    layers = sum(layer_weights(shape, 1).values()) * shape.num_layers
    return layers + vocabularies * shape.vocab_size * shape.hidden_size + shape.hidden_size


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass of the whole model.

    Attributes:
        layers_per_token: matrix products of all layers, per token.
        mlp_per_token: the part of them that is in the MLPs.
        output_per_token: the output layer, per token.
        attention_per_pair: causal attention of all layers, per token² of a document.
    """

    layers_per_token: float
    mlp_per_token: float
    output_per_token: float
    attention_per_pair: float

    @classmethod
    def of(cls, shape: ModelShape) -> ForwardFlops:
        """The counts of a Llama."""
        weights = layer_weights(shape, 1)
        mlp = weights["fc1"] + weights["fc2"]
        return cls(
            layers_per_token=2.0 * shape.num_layers * (weights["qkv"] + weights["proj"] + mlp),
            mlp_per_token=2.0 * shape.num_layers * mlp,
            output_per_token=2.0 * shape.hidden_size * shape.vocab_size,
            attention_per_pair=2.0 * shape.num_layers * shape.num_heads * shape.head_dim,
        )
