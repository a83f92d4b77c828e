import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.rope import Llama3Scaling, YarnScaling
from megatron_prolong.recipe.shape import ModelShape, model_directory, read_shape, to_hf_config
from megatron_prolong.training.run_directory import Checkpoint
from tests.plan.plan_shapes import LLAMA3_8B
from tests.recipe.conftest import describe_checkpoint

CONFIGS = Path(__file__).parent / "configs"
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)


def test_llama_3_8b() -> None:
    assert read_shape(CONFIGS / "llama-3-8b-instruct") == LLAMA3_8B


def test_llama_3_70b() -> None:
    large = LLAMA3_8B.replace(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64)
    assert read_shape(CONFIGS / "llama-3-70b-instruct") == large


SHAPES = [
    LLAMA3_8B,
    LLAMA3_8B.replace(rope_scaling=SCALING, max_length=131_072),
    LLAMA3_8B.replace(
        rope_scaling=YarnScaling(factor=128.0, original_max_length=8192, beta_fast=4.0, attention_factor=1.2)
    ),
    LLAMA3_8B.replace(tie_embeddings=True, head_dim=64, rope_base=8e6, norm_eps=1e-6, initializer_range=0.01),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_config_there_and_back(shape: ModelShape) -> None:
    assert ModelShape.from_hf(to_hf_config(shape), "config.json") == shape
    assert ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_and_writes_the_same_shape(shape: ModelShape, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(shape)))
    theirs = LlamaConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert read_shape(tmp_path / "again") == shape


@pytest.mark.parametrize(
    "temperature",
    [{}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"mscale": 0.7}],
    ids=str,
)
def test_yarns_attention_factor_is_the_one_of_transformers(temperature: dict[str, float]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, **temperature}
    config = LlamaConfig(rope_parameters={**yarn, "rope_theta": 5e5})
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    shape = ModelShape.from_hf(config.to_dict(), "config.json")
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.attention_factor == expected
    again = ModelShape.from_hf(to_hf_config(shape), "exported")
    assert again.rope_scaling == shape.rope_scaling


@pytest.mark.parametrize("shape", SHAPES)
def test_both_spellings_of_rope_are_written(shape: ModelShape) -> None:
    config = to_hf_config(shape)
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    assert ModelShape.from_hf(old, "transformers 4") == ModelShape.from_hf(new, "transformers 5") == shape


def test_the_source_config_travels_along() -> None:
    source = {"bos_token_id": 128_000, "rope_theta": 5e5, "max_position_embeddings": 8192}
    config = to_hf_config(LLAMA3_8B.replace(rope_base=8e6, max_length=65_536), source)
    assert config["bos_token_id"] == 128_000
    assert (config["rope_theta"], config["max_position_embeddings"]) == (8e6, 65_536)
    assert source["rope_theta"] == 5e5  # not changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type is 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings is None; a number above 0 is needed beside rope_type",
        ),
        (
            {
                "rope_parameters": None,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 8192,
                    "mscale": -1,
                },
            },
            "mscale is -1; a number above 0 is needed beside rope_type",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a number above 0 is needed"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"num_key_value_heads": 2.5}, "num_key_value_heads is 2.5; a positive whole number is needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a positive whole number is needed"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
        (
            {
                "rope_parameters": None,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
                "original_max_position_embeddings": 8192,  # transformers does not look there either
            },
            "original_max_position_embeddings is None; a number above 0 is needed beside rope_type",
        ),
        ({"rope_parameters": {"rope_theta": "large"}}, "rope_theta is 'large'; a number above 0 is needed"),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta is -1; a number above 0 is needed"),
        ({"rope_parameters": "linear"}, "the rotary settings are 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "the rotary settings are {"),
        ({"rope_theta": 8e6}, "rope_parameters says something else than rope_theta"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters says something else than rope_theta",
        ),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=r"here/config\.json") as caught:
        ModelShape.from_hf({**to_hf_config(LLAMA3_8B), **change}, "here/config.json")
    assert reason in str(caught.value)
    assert str(caught.value).count("\n") == 1  # this one reason only


def test_null_is_as_good_as_absent() -> None:
    sizes = ["max_position_embeddings", "rms_norm_eps", "initializer_range", "num_key_value_heads"]
    nulls = dict.fromkeys([*sizes, "rope_theta", "rope_scaling", "rope_parameters"])
    config = {**to_hf_config(LLAMA3_8B), **nulls}
    del config["tie_word_embeddings"]
    found = ModelShape.from_hf(config, "config.json")
    assert not found.tie_embeddings
    assert (found.max_length, found.norm_eps, found.initializer_range) == (2048, 1e-6, 0.02)
    assert found.num_kv_heads == found.num_heads
    assert (found.rope_base, found.rope_scaling) == (10_000, None)


def test_a_yarn_of_few_words_has_transformers_defaults() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "truncate": False}
    config = {**to_hf_config(LLAMA3_8B), "rope_parameters": {**rope, "rope_theta": 5e5}}
    assert ModelShape.from_hf(config, "config.json").rope_scaling == YarnScaling(
        factor=4.0,
        original_max_length=8192,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=0.1 * math.log(4) + 1,
        truncate=False,
    )


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(UserError) as caught:
        ModelShape.from_hf({"model_type": "qwen2", "attention_bias": True}, "config.json")
    assert all(word in str(caught.value) for word in ("qwen2", "attention_bias", "hidden_size", "vocab_size"))


def test_read_shape_of_a_checkpoint_and_of_a_stage_directory(tmp_path: Path) -> None:
    checkpoint = tmp_path / "64k" / "step_00000125"
    checkpoint.mkdir(parents=True)
    describe_checkpoint(checkpoint, "training", SHAPES[1])
    (tmp_path / "64k" / "latest").write_text("step_00000125\n")
    assert model_directory(tmp_path / "64k") == checkpoint
    for path in (checkpoint, tmp_path / "64k", tmp_path / "64k" / "latest"):
        assert read_shape(path) == SHAPES[1]
    for path, run in ((tmp_path, "this"), (tmp_path / "65k", str(tmp_path))):
        with pytest.raises(UserError, match=f"{run} is a run, give one of its stages: {tmp_path}/64k"):
            read_shape(path)


def test_a_name_on_the_hub_is_told_how_to_fetch_it() -> None:
    with pytest.raises(UserError, match=r"no such directory.*fetch it first: hf download"):
        read_shape("meta-llama/Llama")


def test_deepspeeds_latest_beside_a_model_is_not_followed(tmp_path: Path) -> None:
    """As transformers' Trainer leaves it: checkpoint-500 holds config.json, latest and global_step500."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SHAPES[0])))
    (tmp_path / "latest").write_text("global_step500")
    (tmp_path / "global_step500").mkdir()
    assert model_directory(tmp_path) == tmp_path
    assert read_shape(tmp_path) == SHAPES[0]


def test_read_shape_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        read_shape(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: expected a JSON object, found list"):
        read_shape(tmp_path)


def edited(**shape: object) -> dict[str, Any]:
    return {"format": 1, "kind": "weights", "step": 0, "shape": {**LLAMA3_8B.to_dict(), **shape}}


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({}, "format None; this version reads format 1"),
        ({"format": 2, "model": {}}, "format 2; this version reads format 1"),
        ({"format": 1, "shape": {"layers": 3}}, "not a checkpoint description"),
        ({"format": 1, "shape": None}, "not a checkpoint description"),
        ({"format": 1, "shape": LLAMA3_8B.to_dict()}, "does not say kind and step"),
        (edited(num_layers="32"), "num_layers is '32': not the kind of number"),
        (edited(num_heads=32.0, tie_embeddings=0), "num_heads is 32.0, tie_embeddings is 0: not"),
        (edited(rope_base="8e6"), "rope_base is '8e6': not"),
        (edited(rope_scaling={**asdict(SCALING), "factor": "8"}), "factor is '8': not"),
        ({**edited(), "sequence_length": "64K", "step": "7"}, "step is '7', sequence_length is '64K': not"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(
    tmp_path: Path, manifest: dict[str, Any], said: str
) -> None:
    """An emptied description, one of a newer version, one with other fields, one edited by hand: always named."""
    (tmp_path / "prolong.json").write_text(json.dumps(manifest))
    for read in (read_shape, Checkpoint.open):
        with pytest.raises(UserError, match=rf"prolong\.json: {said}"):
            read(tmp_path)
