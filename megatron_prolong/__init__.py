"""Megatron-ProLong: long-context continued training of Llama models on Megatron-Core."""
