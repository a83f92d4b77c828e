"""Exports work unchanged in transformers 5 (here) and 4 (the interpreter in PROLONG_TRANSFORMERS4_PYTHON).

vLLM and lm-eval load a model through transformers' config: what transformers makes of the exported config is
compared, field by field, with what it makes of the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_family
from transformers import AutoModelForCausalLM

from megatron_prolong.convert.sidecar import exported_config, write_config
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.recipe.shape import ModelShape, read_json

CONFIGS = Path(__file__).parents[1] / "recipe" / "configs"
PYTHONS = {"5": sys.executable, "4": os.environ.get("PROLONG_TRANSFORMERS4_PYTHON", "")}
READ_CONFIGS = """
import json, sys
from transformers import AutoConfig, __version__
assert __version__.split(".")[0] == sys.argv[1], __version__
print(json.dumps([AutoConfig.from_pretrained(path).to_dict() for path in sys.argv[2:]]))
"""
LOGITS = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.split(".")[0] == sys.argv[1], __version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], torch_dtype="auto")
with torch.no_grad():
    numpy.save(sys.argv[4], model(torch.from_numpy(numpy.load(sys.argv[3]))).logits.numpy())
print(model.dtype, model.generation_config.eos_token_id)
"""
ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}


def run(version: str, program: str, *arguments: object) -> str:
    if not PYTHONS[version]:
        pytest.skip("PROLONG_TRANSFORMERS4_PYTHON names no interpreter with transformers 4")
    command = [PYTHONS[version], "-c", program, version, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("version", PYTHONS)
def test_real_configs_mean_the_same_after_export(tmp_path: Path, version: str) -> None:
    names = sorted(path.name for path in CONFIGS.iterdir())
    for name in names:
        original = read_json(CONFIGS / name / "config.json")
        shape = ModelShape.from_hf(original, name)
        for suffix, changed in {
            "same": shape,
            "longer": shape.replace(rope_base=1.28e8, max_length=524288),
        }.items():
            (tmp_path / f"{name}-{suffix}").mkdir()
            write_config(tmp_path / f"{name}-{suffix}", exported_config(changed, original, "bfloat16"))
    paths = [
        path
        for name in names
        for path in (CONFIGS / name, tmp_path / f"{name}-same", tmp_path / f"{name}-longer")
    ]
    configs = json.loads(run(version, READ_CONFIGS, *paths))
    assert len(names) >= 4
    for original, same, longer in zip(configs[::3], configs[1::3], configs[2::3], strict=True):
        rope = "rope_parameters" if version == "5" else "rope_scaling"
        assert differing(original, same) <= {"rope_parameters"} - {rope}
        assert differing(original, longer) <= {"max_position_embeddings"} | ROPE
        assert longer["max_position_embeddings"] == 524288
        if version == "5":
            assert longer[rope] == {**original[rope], "rope_theta": 1.28e8}
        else:
            assert longer["rope_theta"] == 1.28e8 and longer[rope] == original[rope]


def differing(one: dict, other: dict) -> set[str]:
    fields = (one.keys() | other.keys()) - {"_name_or_path"}
    return {field for field in fields if one.get(field) != other.get(field)}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_computes_the_logits_of_transformers_5(tmp_path: Path, family: str) -> None:
    """fp32 on both sides; the two versions may sum in another order."""
    original = save_family(family, tmp_path / "original")
    to_megatron(original, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "exported")
    tokens = np.random.default_rng(1).integers(0, 259, (1, 120))
    np.save(tmp_path / "tokens.npy", tokens)
    said = run("4", LOGITS, tmp_path / "exported", tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert said.split(maxsplit=1) == ["torch.float32", "[2, 5]\n"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original)(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
