"""Tiny runs in real processes: what `prolong train` does, as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from megatron_prolong.data.mds import MDSWriter

RECIPE = """\
name: tiny
run_dir: {run_dir}
model:
  init:
    {{num_layers: 4, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, max_length: 64,
      rope_base: 1e4}}
  tokenizer: {root}/tokenizer
precision: fp32
recompute: none
checkpoint: {{every: {every}, keep: 2}}
stages:
  - {{name: short, sequence_length: 64, batch_tokens: 256, steps: 6, lr: 1e-2, mixture: {{{root}/data: 1.0}}}}
  - name: long
    rope_base: 1e5
    seed: 43
    sequence_length: 64
    batch_tokens: 256
    steps: 4
    lr: 1e-2
    mixture: {{{root}/data: 1.0}}
"""


PROGRAM = ("-m", "megatron_prolong")


class Workspace:
    """A directory with a tokenizer, packed data and a recipe; runs are named within it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def recipe(self, run: str, every: int = 3) -> Path:
        path = self.root / f"{run}.yaml"
        path.write_text(RECIPE.format(run_dir=self.root / run, root=self.root, every=every))
        return path

    def write_data(self, name: str, seed: int = 0) -> None:
        """20 packs of two documents; each repeats one token, so that there is something to learn in a few steps."""
        random = np.random.default_rng(seed)
        columns = {
            "input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "int",
        }  # fmt: skip
        with MDSWriter(self.root / name, columns) as writer:
            for _ in range(20):
                cut = int(random.integers(1, 64))
                tokens = np.repeat(random.integers(0, 100, 2), [cut, 64 - cut]).astype(np.uint32)
                indices = np.array([[0, cut], [cut, 64]], np.uint32)
                writer.write({"input_ids": tokens, "indices": indices, "domain": "data", "length": 64})

    def start(self, run: str, *overrides: str) -> subprocess.Popen[str]:
        """`prolong train` in the background; its output is on `stdout`."""
        command = [sys.executable, "-m", "megatron_prolong", "train", str(self.recipe(run)), *overrides]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start_ranks(
        self, run: str, *overrides: str, on_rank_1: Sequence[str] = (), program: Sequence[str] = PROGRAM
    ) -> list[subprocess.Popen[str]]:
        """Two ranks as a launcher starts them; what each says goes to its `stderr`.

        on_rank_1: more overrides there, as if its node had another recipe.
        program: of the command, for Python.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, *program, "train", str(self.recipe(run)), *overrides]
        return [
            subprocess.Popen(
                [*command, *(on_rank_1 if rank else ())],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={
                    **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
                    "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                },
            )
            for rank in range(2)
        ]  # fmt: skip

    def train(self, run: str, *overrides: str, code: int = 0) -> str:
        """Run `prolong train` to its end; returns its output after checking the exit code."""
        process = self.start(run, *overrides)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def losses(self, run: str) -> dict[tuple[str, int], float]:
        """The last recorded loss of every step."""
        lines = (self.root / run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {(line["stage"], line["step"]): line["loss"] for line in records if "loss" in line}


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    directory.mkdir()
    vocabulary = {f"t{number}": number for number in range(vocab_size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_tokenizer(root / "tokenizer", vocab_size=100)
    built = Workspace(root)
    built.write_data("data")
    return built


@pytest.fixture(scope="session")
def undisturbed(workspace):
    """The losses of a run that nothing interrupted."""
    workspace.train("undisturbed")
    return workspace.losses("undisturbed")
