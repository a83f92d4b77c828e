"""The model that judges citations is asked in TRUE's words and taken at its word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.nli import load_nli


def test_it_supports_what_it_answers_one_to(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no model here; --nli wants"):
        load_nli(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for config, said in (
        ("{", "no tokenizer that transformers can read"),
        ('{"model_type": "llama"}', r"(?s)cannot load this model: .*--nli wants a copy of"),
        ('{"model_type": "t5"}', r"(?s)cannot load this model: .*--nli wants a copy of"),  # without weights
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match=said):
            load_nli(tmp_path)
    answers = {"A fox.": "1", "No fox.": "0", "11 foxes.": "11"}
    asked = []

    class Model(torch.nn.Module):
        def generate(self, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            asked.append(tokenizer.decode(ids[0]))
            premise = asked[-1].removeprefix("premise: ").removesuffix(" hypothesis: It is a fox.")
            return torch.tensor([tokenizer.encode(f"<bos>{answers[premise]}<eos>")])

    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", lambda *args, **kwargs: Model())
    entails = load_nli(tmp_path)
    assert [entails(premise, "It is a fox.") for premise in (*answers, "A fox.")] == [
        True,
        False,
        False,
        True,
    ]
    assert asked[0] == "premise: A fox. hypothesis: It is a fox." and len(asked) == 3, "asked twice"
