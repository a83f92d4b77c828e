"""The megatron and hf backends agree token by token, with each other and with a plain forward pass."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, tokenization_utils_base

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import hf
from megatron_prolong.evaluation.backend import Prompt, encode, load_tokenizer, open_backend
from megatron_prolong.evaluation.documents import read_text
from megatron_prolong.evaluation.ending import Ending
from megatron_prolong.evaluation.megatron import inference_layout
from megatron_prolong.mcore import inference
from megatron_prolong.mcore.build import StageModel
from megatron_prolong.recipe.shape import ModelShape

PROMPTS = [
    Prompt("The special magic number"),
    Prompt("a rather longer prompt, so that the batch needs padding " * 3),
    Prompt("What is the key?", chat=True),
]
LOGPROB_TOLERANCE = 2e-4  # fp32, sums in another order


def test_no_text_is_too_long_for_a_tokenizer(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 4  # transformers would warn, of documents that are only measured or cut too
    own.save_pretrained(tmp_path)
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", pytest.fail)
    assert len(load_tokenizer(tmp_path)("one text of more than four tokens")["input_ids"]) > 4


def test_a_tokenizer_that_is_nowhere_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such directory"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(UserError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


def test_hf_logprobs_in_chunks_are_those_of_one_pass(
    hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SCORE_CHUNK_TOKENS", 16)
    ids = torch.arange(2, 102).tolist()
    model = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    with open_backend(hf_directory) as backend:
        found, of_fewer = backend.token_logprobs([ids, ids[:30]])
        assert np.abs(found - expected).max() < LOGPROB_TOLERANCE
        assert np.abs(of_fewer - expected[:29]).max() < LOGPROB_TOLERANCE
        whole, after_one_token = backend.continuation_logprobs(
            [(ids[:60], [ids[60:], ids[60:70], [5]]), (ids[:1], [ids[1:11], ids[1:3]])]
        )
    assert whole[0] == pytest.approx(expected[59:].sum(), abs=1e-3)
    assert whole[1] == pytest.approx(expected[59:69].sum(), abs=1e-3)
    assert whole[2] == pytest.approx(float(logprobs[59, 5]), abs=1e-3)
    assert after_one_token == pytest.approx([expected[:10].sum(), expected[:2].sum()], abs=1e-3)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rotation_by_the_length_is_not_of_a_chunks(
    rope: str, hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SCORE_CHUNK_TOKENS", "PREFILL_CHUNK_TOKENS"):
        monkeypatch.setattr(hf, name, 40)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    config = AutoConfig.from_pretrained(hf_directory)
    config.max_position_embeddings = 64
    config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    config.rope_parameters |= factors if rope == "longrope" else {}
    models = [AutoModelForCausalLM.from_pretrained(hf_directory, config=config).eval() for _ in range(3)]
    backends = [
        hf.HuggingFaceBackend(model, Ending(hf_directory, frozenset()), "x", 1024) for model in models
    ]
    ids = torch.arange(2, 122).tolist()
    with torch.no_grad():
        logprobs = models[0](torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        answer = models[1].generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=1)
    expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    assert np.abs(backends[0].token_logprobs([ids])[0] - expected).max() < LOGPROB_TOLERANCE
    assert backends[2]._generate_batch([ids], 8, ()) == [answer[0, len(ids) :].tolist()]


def test_hf_batches_and_chunks_generate_what_transformers_generates(
    hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "PREFILL_CHUNK_TOKENS", 16)
    model = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32)
    with open_backend(hf_directory, batch_size=3) as backend:
        answers = []
        for prompt in PROMPTS:
            ids = torch.tensor([encode(backend.tokenizer, prompt)])
            output = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
            answers.append(output[0, ids.shape[1] :].tolist())
        expected = backend.tokenizer.batch_decode(answers, skip_special_tokens=True)
        assert backend.generate(PROMPTS, 12) == expected
        stop = answers[0][4]  # the first answer ends before the others
        cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
        stopping = replace(backend, ending=Ending(hf_directory, frozenset([stop])))
        assert stopping.generate(PROMPTS, 12) == backend.tokenizer.batch_decode(cut)
    assert len(set(expected)) == 3 and cut[0] != answers[0] and cut != [[], [], []]


@pytest.mark.parametrize("chunk_tokens", [16, 4096], ids=["prompts in chunks", "prompts together"])
def test_megatron_equals_hf_token_by_token(
    chunk_tokens: int, hf_directory: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "PREFILL_TOKENS", chunk_tokens)
    ids = torch.randint(2, 258, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    passages = [ids, ids[100:150], ids[7:9]]
    questions = [(ids[:200], [ids[200:], ids[:7]]), (ids[:1], [ids[:7]]), (ids[3:9], [ids[:2], [5], ids[:9]])]
    with open_backend(hf_directory, batch_size=3) as reference:
        logprobs = reference.token_logprobs(passages)
        answers = reference.continuation_logprobs(questions)
        texts = reference.generate(PROMPTS, 24)
        stops, length = reference.max_length, encode(reference.tokenizer, PROMPTS[2])
    for batch_size in (2, 3):
        with open_backend(checkpoint, batch_size=batch_size) as ours:
            assert ours.name == "megatron"
            for mine, theirs in zip(ours.token_logprobs(passages), logprobs, strict=True):
                assert np.abs(mine - theirs).max() < LOGPROB_TOLERANCE
            found = ours.continuation_logprobs(questions)
            assert list(chain(*found)) == pytest.approx(list(chain(*answers)), abs=5e-3)
            assert list(map(len, found)) == [2, 1, 3]
            assert ours.generate(PROMPTS, 24) == texts
            assert ours.max_length == stops and encode(ours.tokenizer, PROMPTS[2]) == length
    assert logprobs[0].std() > 0.5, "a model that is certain of nothing would prove nothing"


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_an_answer_ends_at_a_stop_text(
    kind: str, hf_directory: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut before it, and no token behind it is asked for."""
    passes: list[int] = []
    for model in (inference.InferenceModel, hf.HuggingFaceBackend):
        monkeypatch.setattr(model, "_forward", _counted(model._forward, passes))
    with open_backend(hf_directory if kind == "hf" else checkpoint) as backend:
        (whole,) = backend.generate(PROMPTS[:1], 24)
        stop = whole[3:5]
        needed = next(tokens for tokens in range(24) if stop in backend.generate(PROMPTS[:1], tokens)[0])
        passes.clear()
        backend.generate(PROMPTS[:1], needed)
        expected = len(passes)
        assert backend.generate(PROMPTS[:1], 24, ["never", stop]) == [whole[: whole.index(stop)]]
    assert len(passes) == 2 * expected and needed < 12


def _counted(forward: Any, passes: list[int]) -> Any:
    return lambda *given, **named: passes.append(1) or forward(*given, **named)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_begins_with_one_bos(chat: bool, tokenizer: Any) -> None:
    """Llama-3's tokenizer puts it in front of every text, and its chat template writes it as well."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = encode(tokenizer, Prompt("What is the key?", chat))
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_the_date_of_the_day_does_not_change_a_prompt(tokenizer: Any) -> None:
    """Llama-3.2's template asks for it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%H %M') %}{% endif %}"
        "{{ 'Today: ' + date_string }}" + tokenizer.chat_template
    )
    assert tokenizer.decode(encode(tokenizer, Prompt("Well?", chat=True))).startswith("Today: 26 Jul 2024")


def test_a_prompt_without_any_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="prompt '' has no token"):
        encode(tokenizer, Prompt(""))


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_full_gpu_is_named_with_the_model(hf_directory, checkpoint, kind):
    model = hf_directory if kind == "hf" else checkpoint
    said = f"^evaluating {model}: the GPU's memory is full .*--cp"
    with pytest.raises(UserError, match=said), open_backend(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_neither_kind_of_model_is_refused(tmp_path: Path, hf_directory: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"), open_backend(tmp_path):
        pass
    with pytest.raises(UserError, match="megatron"), open_backend(hf_directory, kind="megatron"):
        pass
    (tmp_path / "run" / "64k").mkdir(parents=True)
    (tmp_path / "run" / "64k" / "latest").write_text("step_00000001")
    with pytest.raises(UserError, match=r"give one of its stages: .*run/64k"), open_backend(tmp_path / "run"):
        pass


def test_a_model_without_some_of_its_weights_is_refused(tmp_path: Path, hf_directory: Path) -> None:
    """transformers only warns, and measures random numbers."""
    shutil.copytree(hf_directory, tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "half/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing.*\n  - lm_head\.weight"):
        hf.HuggingFaceBackend.open(tmp_path / "half")
    os.truncate(tmp_path / "half/model.safetensors", 100)
    with pytest.raises(UserError, match=r"half: transformers cannot load this model: .*header"):
        hf.HuggingFaceBackend.open(tmp_path / "half")


def test_a_model_of_nan_is_refused(
    tmp_path: Path, hf_directory: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its greedy answers are token 0 for ever, and would score 0 as those of a bad model do."""
    shutil.copytree(hf_directory, tmp_path / "diverged")
    weights = load_file(tmp_path / "diverged/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "diverged/model.safetensors", {"format": "pt"})
    with (
        pytest.raises(UserError, match=r"diverged: .* not numbers \(NaN\)"),
        open_backend(tmp_path / "diverged"),
    ):
        pass
    monkeypatch.setattr(inference, "load_weights", _fill_with_nan)
    with pytest.raises(UserError, match=rf"{checkpoint}: .* not numbers \(NaN\)"), open_backend(checkpoint):
        pass


def _fill_with_nan(checkpoint: Path, model: StageModel) -> None:
    for parameter in model.chunks[0].parameters():
        torch.nn.init.constant_(parameter, float("nan"))


def test_tensor_parallelism_stops_where_the_model_does_not_divide() -> None:
    shape = ModelShape(
        num_layers=1, hidden_size=16, ffn_hidden_size=6, num_heads=8, num_kv_heads=4, head_dim=2, vocab_size=32,
        max_length=64, rope_base=1e4,
    )  # fmt: skip
    assert [inference_layout(shape, ranks).tp for ranks in (1, 2, 4, 6)] == [1, 2, 2, 2]
    assert inference_layout(replace(shape, ffn_hidden_size=8), 8, cp=2).tp == 4


def test_an_empty_haystack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="empty; a haystack needs text"):
        read_text(tmp_path)


def test_a_penalty_that_is_not_applied_is_warned_of(
    hf_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(hf_directory, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 1, "repetition_penalty": 1.05}')
    for directory, warned in ((hf_directory, False), (model, True)):
        with open_backend(directory):
            assert ("repetition_penalty 1.05" in capsys.readouterr().err) == warned
