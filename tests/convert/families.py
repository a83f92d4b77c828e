"""Small random checkpoints in the shape of every Llama family, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Grouped queries, an FFN that is not a multiple of anything, a vocabulary that Megatron pads.
_LLAMA3 = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "tie_word_embeddings": False,
    # Large, so that a wrong row changes the logits visibly.
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama3": {**_LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3.1": {**_LLAMA3, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}},
    "llama3.2-tied": {
        **_LLAMA3,
        "rope_parameters": {**LLAMA3_SCALING, "factor": 32.0, "rope_theta": 5e5},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "yarn": {
        **_LLAMA3,
        "rope_parameters": {**LLAMA3_SCALING, "rope_type": "yarn", "beta_fast": 4.0, "rope_theta": 5e5},
    },
    "llama2": {
        **_LLAMA3,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": 2,
    },
}


def save_family(name: str, directory: Path, dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """Random weights (norms too) of a family as a Hugging Face directory."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=True)
    model.to(dtype).save_pretrained(directory, **save)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name
