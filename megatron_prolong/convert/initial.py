"""A checkpoint of random weights, to train from nothing."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.convert.names import Rows
from megatron_prolong.convert.sidecar import copy_sidecar, exported_config, write_tokenizers_config
from megatron_prolong.convert.to_megatron import write_checkpoint
from megatron_prolong.recipe.inputs import tokenizer_file, vocabulary_size
from megatron_prolong.recipe.schema import InitSpec
from megatron_prolong.recipe.shape import ModelShape


class RandomWeights:
    """Normal(0, initializer_range) matrices and norms of one: transformers' own initialisation, in fp32.

    Every row has its own seed, so the numbers do not depend on how the rows are read.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self._std = shape.initializer_range
        self._seed = seed

    def dtype(self, rows: Rows) -> torch.dtype:
        """Always fp32."""
        return torch.float32

    def read_into(self, rows: Rows, out: Tensor) -> None:
        """Fill `out` [count, …] with the rows' numbers."""
        if out.dim() == 1:
            out.fill_(1.0)
            return
        generator = torch.Generator()
        for index, row in enumerate(out, start=rows.start):
            generator.manual_seed(_stable_hash(f"{self._seed}/{rows.name}/{index}"))
            row.normal_(0.0, self._std, generator=generator)


def write_initial(init: InitSpec, tokenizer: Path, out: Path, seed: int) -> None:
    """Write a checkpoint of random weights whose vocabulary is the tokenizer's.

    Args:
        init: the model's size.
        tokenizer: directory of a tokenizer or model, or a checkpoint; the tokenizer's files travel along.
        out: directory to make.
        seed: the weights are a pure function of (init, vocabulary size, seed).

    Raises:
        UserError: no tokenizer.json, `out` exists, disk full.
    """
    path = tokenizer_file(tokenizer)
    shape = init.shape(vocabulary_size(tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        sidecar = Path(directory)
        copy_sidecar(path.parent, sidecar)
        write_tokenizers_config(sidecar, exported_config(shape, None, "float32"))
        write_checkpoint(out, shape, RandomWeights(shape, seed), torch.float32, sidecar)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
