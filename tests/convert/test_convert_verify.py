"""`verify`, `inspect` and the logits check notice what is wrong, and only that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_prolong.cli.convert import app
from megatron_prolong.convert import logits, transfer
from megatron_prolong.convert.compare import compare
from megatron_prolong.convert.describe import describe
from megatron_prolong.convert.dist_weights import DistWeights
from megatron_prolong.convert.logits import largest_logit_difference
from megatron_prolong.convert.names import Rows
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import read_shape


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Hugging Face directory and its conversion."""
    original = save_family("llama3.1", tmp_path / "original")
    to_megatron(original, tmp_path / "megatron")
    return original, tmp_path / "megatron"


def _edit(directory: Path, name: str, row: int, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_equal_across_formats(pair: tuple[Path, Path]) -> None:
    comparison = compare(*pair)
    assert comparison.equal
    assert comparison.lines() == ["39 of 39 tensors are bit-equal, 0 config differences"]


def test_changed_rows_are_found(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In two chunks, which hold a few rows each; the larger difference is told."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    original, converted = pair
    name = "model.layers.2.self_attn.k_proj.weight"
    before = load_file(original / "model.safetensors")[name][3]
    _edit(original, name, row=3, value=7.0)
    _edit(original, name, row=9, value=0.0)
    comparison = compare(original, converted)
    assert [tensor.name for tensor in comparison.tensors if not tensor.exact] == [name]
    expected = (7.0 - before).abs().max()
    assert f"{name}: float32, largest difference {expected:g}" in comparison.lines()


def test_minus_zero_is_not_bit_equal_to_zero(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, name in ((0.0, "one"), (-0.0, "other")):
        shutil.copytree(pair[0], tmp_path / name)
        _edit(tmp_path / name, "model.norm.weight", row=0, value=number)
    comparison = compare(tmp_path / "one", tmp_path / "other")
    assert not comparison.equal
    assert comparison.lines() == [
        "model.norm.weight: float32, largest difference 0",
        "38 of 39 tensors are bit-equal, 0 config differences",
    ]


def test_models_of_other_sizes_are_not_compared_tensor_by_tensor(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nor where Hugging Face's tensors have the same sizes, for Megatron's rows lie in another order."""
    manifest = json.loads((pair[1] / "prolong.json").read_text())
    manifest["shape"] |= {"num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
    (pair[1] / "prolong.json").write_text(json.dumps(manifest))
    for other in (pair[1], save_family("llama3.2-tied", tmp_path / "tied")):
        comparison = compare(pair[0], other)
        assert not comparison.equal and not comparison.same_tensors
        assert comparison.lines()[-1].startswith("0 of 0 tensors are bit-equal")
    assert len(comparison.config) == 3, comparison.config  # head_dim, tie_embeddings, RoPE's factor


def test_a_tensor_that_is_missing_is_named(pair: tuple[Path, Path]) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, pair[0] / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: missing"):
        compare(*pair)


@pytest.mark.parametrize("spoilt", ["original", "converted"])
def test_nan_is_never_equal_to_a_number(
    pair: tuple[Path, Path], spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoilt == "original":
        _edit(pair[0], "model.norm.weight", row=0, value=float("nan"))
    else:
        read_into = DistWeights.read_into

        def spoil(self: DistWeights, rows: Rows, out: Tensor) -> None:
            read_into(self, rows, out)
            if rows.name.endswith("final_layernorm.weight"):
                out[0] = float("nan")

        monkeypatch.setattr(DistWeights, "read_into", spoil)
    for comparison in (compare(*pair), compare(pair[1], pair[0])):
        assert not comparison.equal
        assert comparison.lines()[0] == "model.norm.weight: float32, largest difference nan"


def test_dtype_and_config_differences_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = pair
    to_megatron(original, tmp_path / "bf16", dtype="bf16")
    comparison = compare(original, tmp_path / "bf16")
    assert not comparison.equal
    assert any("bfloat16 and float32" in line for line in comparison.lines())
    assert compare(original, tmp_path / "bf16", cast=True).equal
    config = json.loads((original / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    config["initializer_range"] = 0.01  # decided the first weights of a training, not what these compute
    (original / "config.json").write_text(json.dumps(config))
    comparison = compare(original, converted)
    assert comparison.config == [f"rope_base: 1000000.0 in {original}, 500000.0 in {converted}"]
    assert comparison.same_tensors and not comparison.equal


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family: str, tmp_path: Path) -> None:
    original = save_family(family, tmp_path / "original", torch.bfloat16)
    to_megatron(original, tmp_path / "megatron")
    difference = largest_logit_difference(original, tmp_path / "megatron")
    # fp32 sums in another order, through four layers of large random weights.
    assert difference is not None and difference < 1e-4


def test_logits_are_not_computed_where_they_do_not_fit(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(tensor.nbytes for tensor in load_file(pair[0] / "model.safetensors").values())
    for available, computed in ((weights, False), (3 * weights, True)):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(logits.psutil, "virtual_memory", lambda memory=memory: memory)
        assert (largest_logit_difference(*pair) is not None) == computed


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_base", 1e4), ("rope_scaling", None), ("norm_eps", 0.1)],
)
def test_logits_notice_a_wrong_config(pair: tuple[Path, Path], field: str, value: float | None) -> None:
    original, converted = pair
    manifest = json.loads((converted / "prolong.json").read_text())
    manifest["shape"][field] = value
    (converted / "prolong.json").write_text(json.dumps(manifest))
    difference = largest_logit_difference(original, converted)
    assert difference is not None and difference > 1e-2


def test_inspect_of_an_empty_file(pair: tuple[Path, Path]) -> None:
    save_file({}, pair[0] / "model.safetensors")
    assert "  0 tensors, 0.000 GB" in list(describe(pair[0]))


def test_inspect_lists_everything(pair: tuple[Path, Path]) -> None:
    original, converted = pair
    text = "\n".join(describe(converted))
    assert "Megatron checkpoint (weights)" in text
    assert "rope_base: 500000.0" in text
    assert "decoder.layers.self_attention.linear_qkv.weight" in text and "[4, 96, 64]" in text
    size = sum(tensor.nbytes for tensor in load_file(original / "model.safetensors").values())
    assert f"9 tensors, {size / 1e9:.3f} GB" in text
    assert f"39 tensors, {size / 1e9:.3f} GB" in "\n".join(describe(original))


def test_what_a_conversion_says_about_itself(pair: tuple[Path, Path]) -> None:
    """The next versions read it too."""
    content = json.loads((pair[1] / "prolong.json").read_text())
    assert content.pop("shape") == read_shape(pair[0]).to_dict()
    assert content.pop("versions").keys() >= {"megatron-prolong", "megatron-core", "torch"}
    untrained = dict.fromkeys(("stage", "sequence_length", "layout")) | {"step": 0}
    assert content == {"format": 1, "kind": "weights", "dtype": "float32", **untrained}


def test_inspect_tells_the_training_and_lines_its_columns_up(pair: tuple[Path, Path]) -> None:
    content = json.loads((pair[1] / "prolong.json").read_text())
    assert not [line for line in describe(pair[1]) if "null" in line]
    content |= {"stage": "64k", "step": 7, "sequence_length": 65536, "layout": {"tp": 2}}
    (pair[1] / "prolong.json").write_text(json.dumps(content))
    lines = list(describe(pair[1]))
    told = ['stage: "64k"', "step: 7", "sequence_length: 65536", 'dtype: "float32"', 'layout: {"tp": 2}']
    assert lines[1:6] == [f"  {line}" for line in told]
    tensors = [line for line in lines if " float32 " in line]
    assert len(tensors) == 9 and len({line.index(" float32 ") for line in tensors}) == 1
    assert any(line.endswith("float32   [4, 96, 64]  4 chunks") for line in tensors)
    assert any(line.endswith("float32   [64]") for line in tensors)


def test_an_export_of_a_run_is_verified_against_its_newest_checkpoint(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    pair[1].rename(stage / "step_00000010")
    (stage / "latest").write_text("step_00000010\n")
    for command in (
        ["to-hf", stage, tmp_path / "out", "--verify"],
        ["verify", pair[0], stage],
        ["inspect", stage],
    ):
        result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
        assert result.exit_code == 0, result.output


def test_the_commands_say_what_they_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = (str(path) for path in pair)
    run = CliRunner().invoke
    result = run(app, ["to-hf", converted, str(tmp_path / "exported"), "--verify", "--max-length", "64"])
    assert result.exit_code == 0, result.output
    assert "config.json: max_position_embeddings: 128 -> 64" in result.output
    assert "39 of 39 tensors are bit-equal, 1 config differences" in result.output
    assert "differ from transformers' by" in result.output
    assert run(app, ["verify", original, converted]).exit_code == 0
    for direction, source in (("to-megatron", original), ("to-hf", converted)):
        narrow = str(tmp_path / f"{direction}-fp16")
        result = run(app, [direction, source, narrow, "--dtype", "fp16", "--verify"])
        assert result.exit_code == 0, result.output
        assert "39 of 39 tensors are bit-equal" in result.output
        assert "logits not compared: the dtype changed" in result.output
        assert run(app, ["verify", original, narrow]).exit_code == 1
    assert "rope_base: 500000.0" in run(app, ["inspect", converted]).output
    for impossible in (["--rope-base", "0"], ["--max-length", "-5"], ["--max-length", "64Q"]):
        refused = ["to-hf", converted, str(tmp_path / "wrong"), *impossible, "--contradict"]
        assert run(app, refused).exit_code == 2
    base = ["to-hf", converted, str(tmp_path / "wrong"), "--rope-base", "1e4", "--contradict", "--verify"]
    assert run(app, base).exit_code == 1  # meant or not, the logits are not those of the training


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
@pytest.mark.parametrize("convert", [to_hf, to_megatron])
def test_a_conversion_whose_tensors_differ_ends_with_an_error(
    convert: Callable[..., object],
    dtype: list[str],
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = pair[convert is to_hf]

    def convert_wrongly(source: Path, out: Path, *options: object, **how: object) -> object:
        result = convert(source, out, *options, **how)
        _edit(out if convert is to_hf else source, "model.norm.weight", 3, 9.0)
        return result

    monkeypatch.setattr(f"{convert.__module__}.{convert.__name__}", convert_wrongly)
    command = [convert.__name__.replace("_", "-"), str(source), str(tmp_path / "out"), "--verify", *dtype]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "38 of 39 tensors are bit-equal" in result.output, result.output
