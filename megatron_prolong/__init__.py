"""Megatron-ProLong: long-context continued training of Llama models on Megatron-Core."""

__version__ = "0.1.0"
