"""The natural-language-inference model behind citation scores (google/t5_xxl_true_nli_mixture, 11B)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import load_tokenizer
from megatron_prolong.evaluation.task import Entails


def refuse_no_model(directory: Path) -> None:
    """Raises UserError where no model is, which is seen before 11B weights are read."""
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: no model here; --nli wants a copy of google/t5_xxl_true_nli_mixture")


def load_nli(directory: Path) -> Entails:
    """A function (passage, claim) → supported, from a local copy of the model; bfloat16 on CUDA.

    Raises:
        UserError: it is not there, or transformers does not take it.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSeq2SeqLM

    refuse_no_model(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = load_tokenizer(directory)
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{directory}: transformers cannot load this model: {error}; --nli wants a copy of "
            "google/t5_xxl_true_nli_mixture"
        ) from error
    model.to(device).eval()

    @cache
    def entails(passage: str, claim: str) -> bool:
        ids = tokenizer(f"premise: {passage} hypothesis: {claim}", return_tensors="pt").input_ids.to(device)
        with torch.inference_mode():
            output = model.generate(ids, max_new_tokens=10)
        return bool(tokenizer.decode(output[0], skip_special_tokens=True) == "1")

    return entails
