"""A checkpoint as Megatron-LM leaves it: no prolong.json, its whole command line in common.pt."""

from __future__ import annotations

import argparse
import enum
import json
import pickle
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from typer.testing import CliRunner

from megatron_prolong.cli.convert import app
from megatron_prolong.convert.checkpoint import shape_from_args
from megatron_prolong.convert.describe import describe
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import ModelShape


class AttnBackend(enum.Enum):
    """Stands for Megatron's own enum: a class the reader must not need."""

    auto = 5


def _args(family: str, **changes: object) -> argparse.Namespace:
    config = FAMILIES[family]
    rope = config["rope_parameters"]
    fields = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim", 8),
        "padded_vocab_size": 512,
        "vocab_size": 259,
        "max_position_embeddings": 128,
        "seq_length": 128,
        "rotary_base": int(rope["rope_theta"]),
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 8.0),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "tensor_model_parallel_size": 2,
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.auto,
    }
    return argparse.Namespace(**{**fields, **changes})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Megatron-LM's --save directory with one iteration in it."""
    original = save_family("llama3.2-tied", tmp_path / "original")
    root = tmp_path / "megatron-lm"
    to_megatron(original, root / "iter_0000120")
    (root / "latest_checkpointed_iteration.txt").write_text("120")
    (root / "iter_0000120" / "prolong.json").unlink()
    for path in (root / "iter_0000120" / "hf").iterdir():
        path.unlink()
    (root / "iter_0000120" / "hf").rmdir()
    _write(root, _args("llama3.2-tied"))
    return root


def _write(root: Path, args: argparse.Namespace) -> None:
    torch.save({"args": args, "iteration": 120}, root / "iter_0000120" / "common.pt")


def test_exported_from_its_args_alone(checkpoint: Path, tmp_path: Path) -> None:
    to_hf(checkpoint, tmp_path / "exported")
    expected, found = (
        load_file(directory / "model.safetensors")
        for directory in (tmp_path / "original", tmp_path / "exported")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    shape = ModelShape.from_hf(config, "exported")
    assert (shape.rope_base, shape.tie_embeddings, shape.head_dim, shape.num_kv_heads) == (5e5, True, 16, 2)
    assert shape.rope_scaling is not None
    # Megatron-LM always means Llama-3.1's own 8192, whatever this test's family says.
    assert (shape.rope_scaling.factor, shape.rope_scaling.original_max_length) == (32.0, 8192)
    assert "step: 120" in "\n".join(describe(checkpoint))


def test_config_and_tokenizer_come_from_a_hugging_face_directory(checkpoint: Path, tmp_path: Path) -> None:
    _write(checkpoint, _args("llama3.2-tied", vocab_size=None))
    with pytest.raises(UserError, match=r"word_embeddings\.weight: shape \[259, 64\], expected \[512, 64\]"):
        to_hf(checkpoint, tmp_path / "exported")
    exported, original = str(tmp_path / "exported"), str(tmp_path / "original")
    command = ["to-hf", str(checkpoint), exported, "--hf", original, "--verify"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "differ from transformers' by" in result.output, result.output
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["vocab_size"] == 259 and config["eos_token_id"] == [2, 5]
    assert (tmp_path / "exported" / "chat_template.jinja").exists()


def test_an_export_without_a_tokenizer_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing told that the export of a bare checkpoint could not even read a text."""
    out, words = str(tmp_path / "bare"), tmp_path / "words"
    said = CliRunner().invoke(app, ["to-hf", str(checkpoint), out]).stderr
    assert f"warning: {out}: no tokenizer, as none came with {checkpoint}; export again with --hf DIR" in said
    words.mkdir()
    for name, warned in (("chat_template.jinja", True), ("tokenizer.json", False)):
        (words / name).write_text("{}")
        result = CliRunner().invoke(app, ["to-hf", str(checkpoint), f"{out}-{name}", "--hf", str(words)])
        assert result.exit_code == 0 and bool(result.stderr) == warned


def test_a_tokenizer_alone_leaves_the_end_of_a_text_known(checkpoint: Path, tmp_path: Path) -> None:
    """From the checkpoint's own config.json where it has one, else the tokenizer: transformers assumed 1 and 2."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    words = Tokenizer(models.WordLevel({"<s>": 7, "</s>": 9, "<end>": 11}, "<s>"))
    words.add_special_tokens(["<s>", "</s>", "<end>"])
    words.save(str(tokenizer / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}<end>{% endfor %}"
    eos = {"__type": "AddedToken", "content": "</s>"}
    special = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(special))
    to_megatron(tmp_path / "original", tmp_path / "ours")
    for source, expected, stops in ((checkpoint, (7, 9), [9, 11]), (tmp_path / "ours", (1, [2, 5]), [2, 5])):
        out = tmp_path / f"exported-{source.name}"
        to_hf(source, out, sidecar=tokenizer)
        config = json.loads((out / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == expected
        assert (out / "tokenizer.json").exists()
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == stops


def test_the_pointer_names_a_release_or_an_iteration(checkpoint: Path, tmp_path: Path) -> None:
    pointer = checkpoint / "latest_checkpointed_iteration.txt"
    (checkpoint / "iter_0000120").rename(checkpoint / "release")
    pointer.write_text("release\n")
    to_hf(checkpoint, tmp_path / "exported")
    pointer.write_text("")
    with pytest.raises(UserError, match=r"iteration.txt: found ''; must be the number of an iteration"):
        to_hf(checkpoint, tmp_path / "again")
    pointer.write_text("120")
    with pytest.raises(UserError, match=r"iter_0000120: no such directory, but latest_\w+\.txt names it"):
        to_hf(checkpoint, tmp_path / "again")


def test_newer_versions_keep_the_args_among_the_tensors(checkpoint: Path, tmp_path: Path) -> None:
    """As the object common_state, and without common.pt."""
    directory = checkpoint / "iter_0000120"
    (directory / "common.pt").unlink()
    with pytest.raises(UserError, match=r"neither prolong\.json nor Megatron's common state"):
        to_hf(checkpoint, tmp_path / "exported")
    data, index = directory / "__0_1.distcp", MetadataIndex("common_state/shard_0_1")
    torch.save([{"args": _args("llama3.2-tied"), "iteration": 120}], data)
    contents = pickle.loads((directory / ".metadata").read_bytes())
    contents.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    contents.storage_data[index] = _StorageInfo(data.name, 0, data.stat().st_size)
    (directory / ".metadata").write_bytes(pickle.dumps(contents))
    to_hf(checkpoint, tmp_path / "exported")
    assert "step: 120" in "\n".join(describe(checkpoint))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"__0_1\.distcp: damaged, cannot be read"):
        to_hf(checkpoint, tmp_path / "again")


def test_what_is_not_a_llama_is_refused_with_every_reason(checkpoint: Path, tmp_path: Path) -> None:
    changes = {
        "swiglu": False,
        "normalization": "LayerNorm",
        "position_embedding_type": "none",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "num_experts": 8,
        "apply_layernorm_1p": True,
        "layernorm_zero_centered_gamma": True,
        "multi_latent_attention": True,
        "rotary_seq_len_interpolation_factor": 4,
        "window_size": (64, 0),
        "no_rope_freq": [0, 1],
        "qk_l2_norm": True,
        "softmax_type": "learnable",
        "use_mup": True,
        "apply_residual_connection_post_layernorm": True,
        "glu_linear_offset": 1.0,
    }
    _write(checkpoint, _args("llama3.2-tied", **changes))
    with pytest.raises(UserError) as error:
        to_hf(checkpoint, tmp_path / "exported")
    for name, value in changes.items():
        assert f"{name} is {value!r}" in str(error.value)


def test_what_an_older_version_does_not_say_is_as_its_own_default_was() -> None:
    args = _args("llama3.2-tied", init_method_std=0.01, layernorm_epsilon=1e-6)
    for name in (
        "kv_channels",
        "max_position_embeddings",
        "norm_epsilon",
        "untie_embeddings_and_output_weights",
    ):
        delattr(args, name)
    args.seq_length = 64
    args.group_query_attention = False  # num_query_groups, which is 2, says nothing then
    shape = shape_from_args(args, "here")
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 8, 8)
    assert (shape.max_length, shape.norm_eps, shape.initializer_range) == (64, 1e-6, 0.01)
    assert shape.tie_embeddings
    gpt = ("swiglu", "normalization", "position_embedding_type", "add_bias_linear")
    for name in gpt:
        delattr(args, name)
    with pytest.raises(UserError) as error:
        shape_from_args(args, "here")
    assert [line.split()[1] for line in str(error.value).splitlines()[1:]] == list(gpt)


def test_arguments_that_cannot_be_read_are_named(checkpoint: Path, tmp_path: Path) -> None:
    common = checkpoint / "iter_0000120" / "common.pt"
    content = common.read_bytes()
    for saved, said in (
        ({"iteration": 120}, "its common state holds no args"),
        ([120], r"common\.pt: expected a dict, found list"),
    ):
        torch.save(saved, common)
        with pytest.raises(UserError, match=said):
            to_hf(checkpoint, tmp_path / "exported")
    common.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"common\.pt: damaged, cannot be read"):
        to_hf(checkpoint, tmp_path / "exported")
