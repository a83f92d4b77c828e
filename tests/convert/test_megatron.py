"""Megatron itself loads what the converter writes, and the converter reads what Megatron saves, at any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import assert_same_weights, save_family
from safetensors.torch import load_file

from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.recipe.shape import read_shape
from tests.ranks import run_ranks

RANKS = 4
# Name of the case -> (family, layout, dtype). The layouts leave 4, 1, 2 and 2 data-parallel ranks.
CASES = {
    "tp1": ("llama2", Layout(), "fp32"),
    "tp2-pp2": ("llama3.2-tied", Layout(tp=2, pp=2), "fp32"),
    "pp2-virtual2": ("llama3.1", Layout(pp=2, virtual_pp=2), "fp32"),
    "training": ("llama3", Layout(tp=2), "bf16"),
}


def _load_and_save(root: Path) -> None:
    """Every case through GPTModel's own sharded_state_dict: loaded, and saved again."""
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.checkpoint import load_weights
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.optimizer import build_optimizer
    from tests.mcore.saving import save_weights_and_optimizer

    for case, (_, layout, precision) in CASES.items():
        source, target = root / case / "converted", root / case / "saved"
        with megatron(layout, seed=1):
            training = case == "training"
            model = build_model(read_shape(source), layout, precision=precision, training=training)
            load_weights(source, model)
            optimizer = None
            if training:
                optimizer = build_optimizer(model, OptimizerSpec(), layout, lr=0.0)
                optimizer.reload_model_params()
                optimizer.step()  # with zero gradients and lr 0: fills the optimizer's state, keeps the weights
            if dist.get_rank() == 0:
                target.mkdir()
            dist.barrier()
            save_weights_and_optimizer(target, model, optimizer)
    _load_into_plain_gpt(root / "tp2-pp2" / "converted")


def _load_into_plain_gpt(source: Path) -> None:
    """Megatron's own GPTModel with its own layer spec and its default strictness, no code of ours around it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_prolong.mcore.config import transformer_config
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.recipe.counts import padded_vocab_size

    layout = Layout(tp=2, pp=2, sequence_parallel=False)
    shape = read_shape(source)
    with megatron(layout, seed=1):
        model = GPTModel(
            config=transformer_config(shape, layout, precision="fp32", recompute="none"),
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=padded_vocab_size(shape.vocab_size, tp=2),
            max_sequence_length=128,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
        )
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source))["model"]
        model.load_state_dict(loaded)
        # Transformer Engine's attention and final norm announce objects too, and are refused a checkpoint without.
        modules = {
            "decoder.layers.self_attention.core_attention": shape.num_layers,
            "decoder.final_layernorm": 1,
        }
        of_modules = {
            f"{name} {index}": ShardedObject(
                f"{name}._extra_state", None, (size,), (index,), replica_id=dist.get_rank()
            )
            for name, size in modules.items()
            for index in range(size)
        }
        assert dist_checkpointing.load(of_modules, str(source)) == dict.fromkeys(of_modules)
        expected = load_file(source.parent / "original" / "model.safetensors")
        tp, pp = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        for local in range(shape.num_layers // 2):
            name = f"model.layers.{local + pp * shape.num_layers // 2}.mlp.down_proj.weight"
            assert torch.equal(
                model.decoder.layers[local].mlp.linear_fc2.weight, expected[name].chunk(2, dim=1)[tp]
            ), name


@pytest.fixture(scope="module")
def saved_by_megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    for case, (family, _, dtype) in CASES.items():
        stored = torch.float32 if dtype == "fp32" else torch.bfloat16
        save_family(family, root / case / "original", stored)
        to_megatron(root / case / "original", root / case / "converted")
    run_ranks(RANKS, _load_and_save, root)
    for case in CASES:
        for name in ("prolong.json", "hf"):
            (root / case / "converted" / name).rename(root / case / "saved" / name)
    return root


@pytest.mark.parametrize("case", CASES)
def test_megatron_loads_and_saves_the_same_weights(case: str, saved_by_megatron: Path) -> None:
    directory = saved_by_megatron / case
    to_hf(directory / "saved", directory / "exported")
    expected = load_file(directory / "original" / "model.safetensors")
    found = load_file(directory / "exported" / "model.safetensors")
    assert_same_weights(found, expected)
