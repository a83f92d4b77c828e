"""Memory stays bounded while the model grows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.convert.hf_writer import write_safetensors
from megatron_prolong.convert.names import Rows, hf_tensors
from megatron_prolong.convert.sidecar import exported_config, write_config
from megatron_prolong.recipe.shape import ModelShape

# 430 MB in bf16, of which the embedding and the head are 131 MB each.
SHAPE = ModelShape(
    num_layers=6, hidden_size=1024, ffn_hidden_size=3584, num_heads=16, num_kv_heads=4, head_dim=64,
    vocab_size=64_000, max_length=8192, rope_base=5e5,
)  # fmt: skip
# Converts in a process of its own, three files at once, with chunks a sixteenth of the usual so that the bound is
# far below the model, and prints by how much anonymous memory (what the process allocates; not the cached files)
# grew at most.
MEASURE = """
import sys, threading, time
from pathlib import Path
from megatron_prolong.convert import transfer
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron

transfer.CHUNK_BYTES = 2 * 2**20

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

start = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
(to_megatron if sys.argv[1] == "to_megatron" else to_hf)(sys.argv[2], sys.argv[3], workers=3)
print(peak - start)
"""


class _Ones:
    def dtype(self, rows: Rows) -> torch.dtype:
        return torch.bfloat16

    def read_into(self, rows: Rows, out: Tensor) -> None:
        out.fill_(1)


def _growth(direction: str, source: Path, target: Path) -> int:
    command = [sys.executable, "-c", MEASURE, direction, source, target]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_anonymous_memory_is_a_few_chunks_and_not_the_model(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    write_config(tmp_path / "hf", exported_config(SHAPE, None, "bfloat16"))
    write_safetensors(tmp_path / "hf", [(tensor, torch.bfloat16) for tensor in hf_tensors(SHAPE)], _Ones())
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 400e6
    # Modules loaded on first use and thread stacks are in it too; without streaming it would be the model's size.
    assert _growth("to_megatron", tmp_path / "hf", tmp_path / "megatron") < 100e6
    assert _growth("to_hf", tmp_path / "megatron", tmp_path / "again") < 100e6
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == size
