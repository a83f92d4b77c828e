"""Random weights take their vocabulary from whatever `recipe check` takes for a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_prolong.convert.initial import RandomWeights, write_initial
from megatron_prolong.convert.names import Rows
from megatron_prolong.convert.sidecar import copy_sidecar, write_tokenizers_config
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import InitSpec
from megatron_prolong.recipe.shape import HF_DIR, read_json, read_shape

INIT = InitSpec(num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=1, ffn_hidden_size=16)


def test_a_checkpoint_lends_its_tokenizer(tmp_path: Path) -> None:
    source, first, second = tmp_path / "tokenizer", tmp_path / "first", tmp_path / "second"
    source.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 6}, "a")).save(str(source / "tokenizer.json"))
    write_initial(INIT, source, first, seed=1)
    write_initial(INIT, first, second, seed=1)
    assert read_shape(first) == read_shape(second) and read_shape(first).vocab_size == 7
    for name in ("tokenizer.json", "config.json"):
        assert (first / HF_DIR / name).read_bytes() == (second / HF_DIR / name).read_bytes()
    with pytest.raises(UserError, match=r"absent: no tokenizer\.json"):
        write_initial(INIT, tmp_path / "absent", tmp_path / "third", seed=1)


def test_weights_are_those_of_the_seed_whatever_rows_are_read() -> None:
    """Of matrices as transformers begins them, every row and tensor its own; norms are one."""
    weights = RandomWeights(INIT.shape(100), seed=1)

    def read(
        weights: RandomWeights, start: int, count: int, name: str = "model.embed_tokens.weight"
    ) -> Tensor:
        out = torch.empty(count, 512)
        weights.read_into(Rows(name, None, start, count), out)
        return out

    whole = read(weights, 0, 100)
    assert abs(float(whole.std()) - 0.02) < 4e-4 and abs(float(whole.mean())) < 4e-4
    assert torch.equal(read(weights, 40, 7), whole[40:47])
    assert len(whole.unique(dim=0)) == 100
    for other in (
        read(RandomWeights(INIT.shape(100), seed=2), 0, 100),
        read(weights, 0, 100, "lm_head.weight"),
    ):
        assert not torch.equal(other, whole)
    narrow = RandomWeights(INIT.shape(100).replace(initializer_range=0.01), seed=1)
    assert torch.equal(2 * read(narrow, 0, 100), whole)
    norm = torch.empty(8)
    weights.read_into(Rows("model.norm.weight", None, 0, 8), norm)
    assert norm.tolist() == [1.0] * 8


CHAT = (
    "{% for message in messages %}<begin>{{ message['role'] }} {{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<begin>assistant {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "own", "stops"),
    [
        (CHAT, None, [1, 3]),
        (CHAT.replace("<end>", "<eos>"), None, [1]),
        (CHAT, {"eos_token_id": 1}, 1),
        (CHAT.replace("<end>", ""), None, None),
        ("{{ raise_exception('no chats') }}", None, None),
        (None, None, None),
    ],
)
def test_answers_of_a_chat_end_with_their_turn(
    template: str | None, own: dict[str, int] | None, stops: object, tmp_path: Path
) -> None:
    """At the tokenizer's eos alone a model fine-tuned from nothing would go on to the user's next question."""
    words = {"<bos>": 0, "<eos>": 1, "<begin>": 2, "<end>": 3, "word": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "word")),
        bos_token="<bos>", eos_token="<eos>", extra_special_tokens=["<begin>", "<end>"], chat_template=template,
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if own is not None:
        (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps(own))
    write_initial(INIT, tmp_path / "tokenizer", tmp_path / "model", seed=1)
    generation = tmp_path / "model" / HF_DIR / "generation_config.json"
    written = read_json(generation) if generation.exists() else {}
    assert written.get("eos_token_id") == stops
    assert written.get("bos_token_id") == (0 if isinstance(stops, list) else None)


def test_tokenizers_that_do_not_say_where_texts_begin_and_end(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 6}, "a")).save(str(tmp_path / "tokenizer.json"))
    for special, expected in (({"eos_token": "b"}, {"eos_token_id": 6}), ({"eos_token": "c"}, {})):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, **special}))
        write_tokenizers_config(tmp_path, {})
        assert read_json(tmp_path / "config.json") == expected
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "of a later version"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: no tokenizer that can be read here"):
        write_tokenizers_config(tmp_path, {})
    (tmp_path / "tokenizer.json").unlink()  # a tokenizer.model lies there instead, say
    write_tokenizers_config(tmp_path, {})
    assert read_json(tmp_path / "config.json") == {}


def test_another_tokenizer_leaves_the_models_own_stop_tokens(tmp_path: Path) -> None:
    """Unless it comes with its own: at which an answer ends, a tokenizer alone does not say."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for directory, file in (
        (model, "generation_config.json"),
        (model, "tokenizer.json"),
        (tokenizer, "tokenizer.json"),
    ):
        directory.mkdir(exist_ok=True)
        (directory / file).write_text(f'{{"of": "{directory.name}"}}')
    copy_sidecar(model, tmp_path / "first", tokenizer)
    assert "model" in (tmp_path / "first" / "generation_config.json").read_text()
    assert "tokenizer" in (tmp_path / "first" / "tokenizer.json").read_text()
    (tokenizer / "generation_config.json").write_text('{"of": "tokenizer"}')
    copy_sidecar(model, tmp_path / "second", tokenizer)
    assert "tokenizer" in (tmp_path / "second" / "generation_config.json").read_text()
