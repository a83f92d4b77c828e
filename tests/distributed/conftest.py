from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from small_training import SEQUENCE_LENGTH, VOCAB_SIZE, Job, Trained, assemble, train


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A random Llama (4 layers, 8 heads in 4 groups), written by transformers and converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_prolong.convert.to_megatron import to_megatron

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    hf = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if "embed" in name else 0.1)
    directory = tmp_path_factory.mktemp("layouts")
    hf.save_pretrained(directory / "hf")
    to_megatron(directory / "hf", directory / "megatron")
    return str(directory / "megatron")


@pytest.fixture(scope="session")
def single(one_rank, checkpoint) -> tuple[Trained, dict[str, np.ndarray]]:
    """One process: what all layouts must equal."""
    ranks = one_rank.run(train, Job({"distributed_optimizer": False}, checkpoint))
    return ranks[0], assemble(ranks)
