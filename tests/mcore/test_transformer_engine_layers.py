"""Transformer Engine's own layers, built on CPU: names, marks, checkpoints and FP8 settings. No kernel runs.

Its modules assert that there is CUDA and otherwise build on CPU like any other; what they compute needs a GPU
(tests/gpu).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from reference import reference_llama, shape_of

from megatron_prolong.convert.manifest import MANIFEST
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.mcore import config, specs
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import load_weights
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.mcore.optimizer import build_optimizer
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.runtime.launch import distributed
from tests.mcore.saving import save_weights_and_optimizer

te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine (no GPU)")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs these layers", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def groups():
    with distributed(), megatron(Layout(), seed=1):
        yield


@pytest.fixture
def on_hopper(monkeypatch):
    """Layers are built for an H100 with Transformer Engine, in CPU memory."""
    base = te.module.base.TransformerEngineBaseModule
    init = base.__init__

    def init_as_if_on_gpu(self, *arguments, **options):
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            init(self, *arguments, **options)

    monkeypatch.setattr(base, "__init__", init_as_if_on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (specs, config):
        monkeypatch.setattr(module, "runs_on_transformer_engine", lambda dtype: True)


def build(**options) -> StageModel:
    return build_model(
        shape_of(reference_llama()), Layout(), precision="bf16", loss_chunk_tokens=100, **options
    )


def described(model: StageModel):
    """What a checkpoint holds and what the optimizer is told, as far as names of modules have no part in it."""
    state = model.bare_chunks[0].sharded_state_dict()
    tensors = {}
    for name, value in state.items():
        if not name.endswith("_extra_state"):
            parts = value.build() if hasattr(value, "build") else {"": value}
            tensors |= {
                (part.key, part.global_offset): (part.global_shape, part.dtype, part.replica_id)
                for part in (parts.values() if isinstance(parts, dict) else parts)
            }
    marks = {
        state[name].key: (
            tuple(weight.shape),
            getattr(weight, "tensor_model_parallel", False),
            getattr(weight, "sequence_parallel", False),
            getattr(weight, "allreduce", True),
        )
        for name, weight in model.bare_chunks[0].named_parameters()
    }
    optimizer = build_optimizer(model, OptimizerSpec(), Layout(), lr=1e-4)
    decayed = [
        sum(p.numel() for p in group["params"]) for group in optimizer.param_groups if group["wd_mult"]
    ]
    return tensors, marks, decayed


def test_the_native_layers_have_the_same_tensors(on_hopper, monkeypatch):
    model = build()
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dict(
        model.bare_chunks[0].named_parameters()
    )
    expected = described(model)
    monkeypatch.setattr(specs, "runs_on_transformer_engine", lambda dtype: False)
    assert described(build()) == expected


def test_a_checkpoint_goes_through_these_layers_unchanged(on_hopper, tmp_path):
    """Hugging Face → converted → Transformer Engine's layers → saved → Hugging Face."""
    hf = reference_llama().bfloat16()
    hf.save_pretrained(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "ours")
    model = build()
    load_weights(tmp_path / "ours", model)
    layers = [type(module).__name__ for module in model.bare_chunks[0].modules()]
    assert layers.count("TELayerNormColumnParallelLinear") == layers.count("TERowParallelLinear") == 8
    (tmp_path / "saved").mkdir()
    save_weights_and_optimizer(tmp_path / "saved", model, None)
    (tmp_path / "saved" / MANIFEST).write_text((tmp_path / "ours" / MANIFEST).read_text())
    assert json.loads((tmp_path / "saved" / MANIFEST).read_text())["dtype"] == "bfloat16"
    to_hf(tmp_path / "saved", tmp_path / "back")
    back = type(hf).from_pretrained(tmp_path / "back", dtype=torch.bfloat16).state_dict()
    for name, weight in hf.state_dict().items():
        assert torch.equal(back[name], weight), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "block:2"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_megatron_and_transformer_engine_take_the_fp8_settings(on_hopper, recipe, recompute):
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

    settings = config.transformer_config(
        shape_of(reference_llama()), Layout(), precision="fp8", recompute=recompute, fp8_recipe=recipe
    )
    # Data-parallel ranks have different numbers of micro-batches, behind each of which maxima are shared.
    assert settings.tp_only_amax_red or recipe != "delayed"
    chosen = get_fp8_recipe(settings)
    names = {"tensorwise": "float8_current_scaling", "blockwise": "float8_block_scaling"}
    assert getattr(chosen, names.get(recipe, recipe))()
    with mock.patch.object(te.quantization, "get_device_compute_capability", lambda: (9, 0)):
        for layer in range(settings.num_layers):
            with get_fp8_context(settings, layer):
                in_fp8 = te.quantization.FP8GlobalStateManager.is_fp8_enabled()
            assert in_fp8 == (recipe == "delayed" or 0 < layer < settings.num_layers - 1)


def test_a_flash_attn_that_transformer_engine_does_not_take_is_none(tmp_path):
    """It would be no reason to leave attention to TE, which attends with whole scores then."""
    package = tmp_path / "flash_attn-2.99.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.99.0\n")
    (tmp_path / "flash_attn").mkdir()
    code = (
        "from megatron_prolong.mcore import transformer_engine as ours; print(ours._takes_flash_attention())"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
