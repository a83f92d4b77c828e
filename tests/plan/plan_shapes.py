"""Shapes the planner's tests share."""

from megatron_prolong.recipe.shape import ModelShape

LLAMA3_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    max_length=8192,
    rope_base=5e5,
)
TINY = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=250,
    max_length=256,
    rope_base=1e4,
)
