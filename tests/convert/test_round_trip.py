"""There and back again, bit for bit, for every family; transformers reads the result."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LLAMA3_SCALING, assert_same_weights, save_family
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_prolong.convert import dist_writer, hf_writer, transfer
from megatron_prolong.convert.checkpoint import MegatronCheckpoint
from megatron_prolong.convert.dtypes import parse_dtype
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import ModelShape


def _load(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_round_trip_is_bit_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = save_family(family, tmp_path / "original", dtype)
    for name in ("additional_chat_templates", "tokenizer"):
        (original / name).mkdir()
    (original / "tokenizer" / "notes.txt").write_text("a directory, none of a tokenizer's files")
    (original / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), _load(original))
    chat = ("chat_template.jinja", "additional_chat_templates/rag.jinja")
    for name in ("generation_config.json", "tokenizer_config.json", *chat):
        assert (tmp_path / "exported" / name).read_bytes() == (original / name).read_bytes()
    assert not (tmp_path / "exported" / "tokenizer").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_the_export(family: str, tmp_path: Path) -> None:
    original = save_family(family, tmp_path / "original")
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    tokens = torch.randint(0, 259, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original)(tokens).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
        assert torch.equal(model(tokens).logits, expected)
    assert model.generation_config.eos_token_id == [2, 5]


def test_chunks_and_shards_of_any_size_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_family("llama3", tmp_path / "original")
    # 1000 bytes hold a few rows: chunks end inside heads, gate and up; shards hold a few tensors.
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(hf_writer, "LARGEST_SHARD", 70_000)
    monkeypatch.setattr(dist_writer, "LARGEST_FILE", 70_000)
    to_megatron(original, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("__0_[0-9]*.distcp"))) > 3
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), _load(original))
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "exported").glob("*.safetensors"))
    count = len(shards)
    assert count > 3 and shards == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    headers = [(tmp_path / "exported" / shard).read_bytes()[:8] for shard in shards]
    assert not any(int.from_bytes(length, "little") % 8 for length in headers), "data starts aligned"
    for shard in shards:  # transformers 4 refuses files that do not say it
        assert safe_open(tmp_path / "exported" / shard, "pt").metadata() == {"format": "pt"}
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _load(original).values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")  # reads the index
    # Sharded in as well as out.
    to_megatron(tmp_path / "exported", tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "exported-again")
    assert_same_weights(_load(tmp_path / "exported-again"), _load(original))


def test_dtype_is_converted_as_torch_does(tmp_path: Path) -> None:
    original = save_family("llama3", tmp_path / "original")
    to_megatron(original, tmp_path / "megatron", dtype="bf16")
    to_hf(tmp_path / "megatron", tmp_path / "exported", dtype="fp32")
    expected = {name: tensor.bfloat16().float() for name, tensor in _load(original).items()}
    assert_same_weights(_load(tmp_path / "exported"), expected)
    assert [path.name for path in (tmp_path / "exported").glob("*.safetensors*")] == ["model.safetensors"]
    assert json.loads((tmp_path / "megatron" / "prolong.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == "float32"


def test_names_of_dtypes() -> None:
    assert parse_dtype(None) is None
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    assert [parse_dtype(name) for name in ("bf16", "fp16", "fp32")] == dtypes
    with pytest.raises(UserError, match=r"dtype 'fp8': expected one of bf16, fp16, fp32$"):
        parse_dtype("fp8")


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    original = save_family("llama3", tmp_path / "original")
    (tmp_path / "blobs").mkdir()
    for path in original.iterdir():
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    shutil.rmtree(tmp_path / "blobs")
    assert len(_load(tmp_path / "exported")) == 39
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_index_that_an_earlier_save_left_is_not_read(tmp_path: Path) -> None:
    """transformers takes model.safetensors first."""
    original = save_family("llama3", tmp_path / "original")
    left = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (original / "model.safetensors.index.json").write_text(json.dumps(left))
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), _load(original))


def test_legacy_bin_is_loaded_as_weights_only(tmp_path: Path) -> None:
    original = save_family("llama2", tmp_path / "original")
    tensors = _load(original)
    (original / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.bin": names[:9], "b.bin": names[9:]}
    for shard, keys in shards.items():
        torch.save({key: tensors[key] for key in keys}, original / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (original / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), tensors)

    class Exploit:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**{key: tensors[key] for key in shards["a.bin"]}, "x": Exploit()}, original / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin: cannot be loaded as weights only"):
        to_megatron(original, tmp_path / "refused")
    assert not (tmp_path / "ran").exists()


def test_a_legacy_bin_of_parameters(tmp_path: Path) -> None:
    """As dict(model.named_parameters()) is saved: comparing the tied head wrote into what wants a gradient."""
    original = save_family("llama3.2-tied", tmp_path / "original")
    tensors = _load(original)
    (original / "model.safetensors").unlink()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    parameters["lm_head.weight"] = parameters["model.embed_tokens.weight"]
    torch.save(parameters, original / "pytorch_model.bin")
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), tensors)


def test_a_tied_head_and_old_rotary_buffers_in_the_file_are_ignored(tmp_path: Path) -> None:
    original = save_family("llama3.2-tied", tmp_path / "original")
    tensors = _load(original)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
    }
    save_file({**tensors, **extra}, original / "model.safetensors", metadata={"format": "pt"})
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    assert_same_weights(_load(tmp_path / "exported"), tensors)


class TestRope:
    """What a stage trained at is what the export says, in both spellings of transformers."""

    @pytest.fixture
    def trained(self, tmp_path: Path) -> Path:
        """A checkpoint as a stage leaves it: longer, with a larger base, of a Llama-3.1."""
        to_megatron(save_family("llama3.1", tmp_path / "original"), tmp_path / "trained")
        path = tmp_path / "trained" / "prolong.json"
        manifest = json.loads(path.read_text())
        manifest["shape"]["rope_base"] = 1.28e8
        path.write_text(json.dumps({**manifest, "sequence_length": 4096, "kind": "training"}))
        return tmp_path / "trained"

    def test_base_and_length_are_those_of_the_last_stage(self, trained: Path, tmp_path: Path) -> None:
        changes = to_hf(trained, tmp_path / "exported")
        config = json.loads((tmp_path / "exported" / "config.json").read_text())
        assert config["rope_theta"] == 1.28e8
        assert config["rope_scaling"] == LLAMA3_SCALING
        assert config["rope_parameters"] == {**LLAMA3_SCALING, "rope_theta": 1.28e8}
        assert config["max_position_embeddings"] == 4096
        assert config["eos_token_id"] == [2, 5]
        assert "config.json: max_position_embeddings: 128 -> 4096" in changes
        assert "tokenizer_config.json: model_max_length: 128 -> 4096" in changes
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config
        assert loaded.rope_parameters["rope_theta"] == 1.28e8
        assert ModelShape.from_hf(config, "exported").rope_base == 1.28e8

    def test_generate_accepts_the_length(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Llama-3-8B-Instruct ships max_length 4096: generate refused any longer prompt."""
        path = trained / "hf" / "generation_config.json"
        shipped = {**json.loads(path.read_text()), "max_length": 64, "stop_strings": ["<｜end｜>"]}
        path.write_text(json.dumps(shipped, ensure_ascii=False), encoding="utf-8")
        monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")  # the locale's
        assert "generation_config.json: max_length: 64 -> 4096" in to_hf(trained, tmp_path / "exported")
        written = json.loads((tmp_path / "exported" / "generation_config.json").read_text("utf-8"))
        assert written == {**shipped, "max_length": 4096}

    def test_a_contradiction_is_refused_unless_meant(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError) as error:
            to_hf(trained, tmp_path / "exported", rope_base=5e5, max_length=8192)
        assert "rope base 500000 was asked for, but the weights were trained with 1.28e+08" in str(
            error.value
        )
        assert "max length 8192 was asked for, but the weights are for at most 4096" in str(error.value)
        assert not (tmp_path / "exported").exists()
        to_hf(trained, tmp_path / "exported", rope_base=5e5, max_length=8192, contradict=True)
        shape = ModelShape.from_hf(
            json.loads((tmp_path / "exported" / "config.json").read_text()), "exported"
        )
        assert (shape.rope_base, shape.max_length) == (5e5, 8192)

    def test_a_rope_base_that_config_json_cannot_hold_is_never_meant(
        self, trained: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="inf is no RoPE base; a number above 0"):
            to_hf(trained, tmp_path / "exported", rope_base=math.inf, contradict=True)

    def test_a_stage_on_shorter_sequences_takes_nothing_of_the_length(self, trained: Path) -> None:
        path = trained / "prolong.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_length": 64}))
        assert MegatronCheckpoint.open(trained).shape.max_length == 128

    def test_agreeing_options_are_fine(self, trained: Path, tmp_path: Path) -> None:
        to_hf(trained, tmp_path / "exported", rope_base=1.28e8, max_length=1024)
        shape = ModelShape.from_hf(
            json.loads((tmp_path / "exported" / "config.json").read_text()), "exported"
        )
        assert (shape.rope_base, shape.max_length) == (1.28e8, 1024)
