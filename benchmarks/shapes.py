"""The model that most benchmarks are about."""

from megatron_prolong.recipe.shape import ModelShape

LLAMA3_8B = ModelShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
    vocab_size=128_256, max_length=8192, rope_base=5e5,
)  # fmt: skip
