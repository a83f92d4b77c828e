"""The newcomer's path in docs/afternoon.md: every command in it, in order, with stand-ins for what it downloads.

The batch scripts and the commands are the real ones. Tiny are the recipes' numbers, the model (written by
transformers) and the packed data; sbatch is hidden, so that prolong_all.sh runs its stages one after the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
DOWNLOADS = ("make ", "source ", "hf download ")  # what the stand-ins replace
TOOLS = ("bash", "env", "date", "dirname", "sleep", "wc", "cat", "pkill")
SHORTER = {"8K,32K,128K": "2K", "--samples 20": "--samples 2"}
VOCAB_SIZE, LENGTH = 300, 256
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "int"}


def commands() -> list[str]:
    """The lines after `$ ` in the page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs/afternoon.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with scripts, tiny recipes, a model and data where the page's downloads would be."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name in ("64k", "512k", "sft", "8b"):
        write_tiny_recipe(tmp_path, name)
    write_model(tmp_path / "models/Meta-Llama-3-8B-Instruct")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or pytest.skip(f"needs {tool}"))
    return tmp_path


def write_tiny_recipe(place: Path, name: str) -> None:
    """The shipped recipe on top of small numbers, and packed data in the directories it names."""
    path = place / f"examples/prolong_{name}.yaml"
    stages = load_recipe(path).stages
    path = path.rename(path.with_name(f"full_{name}.yaml"))
    small = f"sequence_length: {LENGTH}, batch_tokens: 16K, steps: 2, layout: {{tp: 1, cp: 1}}"
    tiny = [f"base: {path.name}", "layout: {tp: 1}", "recompute: none", "stages:"]
    tiny += [f"  - {{name: {stage.name}, {small}}}" for stage in stages]
    path.with_name(f"prolong_{name}.yaml").write_text("\n".join(tiny) + "\n")
    for stage in stages:
        for directory in stage.mixture:
            write_domain(place / directory, masked=stage.loss_mask)


def write_domain(directory: Path, masked: bool) -> None:
    if directory.exists():
        return
    random = np.random.default_rng(0)
    columns = {**COLUMNS, "mask": "ndarray:uint8"} if masked else COLUMNS
    with MDSWriter(directory, columns) as writer:
        for _ in range(8):
            tokens = random.integers(5, VOCAB_SIZE, LENGTH).astype(np.uint32)
            sample = {"input_ids": tokens, "domain": directory.name, "length": LENGTH}
            sample["indices"] = np.array([[0, 100], [100, LENGTH]], np.uint32)
            if masked:
                sample["mask"] = (np.arange(LENGTH) % 100 > 50).astype(np.uint8)
            writer.write(sample)


def write_model(directory: Path) -> None:
    """A random Llama with a byte-level tokenizer and Llama-3's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        chat_template="{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}",
    )  # fmt: skip
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def test_every_command_of_the_page_works(place: Path) -> None:
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{place / 'bin'}", "OMP_NUM_THREADS": "1",
        "GPUS": "1", "COLUMNS": "200",
    }  # fmt: skip
    run = [line for line in commands() if not line.startswith(DOWNLOADS)]
    assert len(run) >= 12
    for command in run:
        for long, short in SHORTER.items():
            command = command.replace(long, short)
        done = subprocess.run(
            ["bash", "-c", command], cwd=place, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}"
    config = json.loads((place / "exported/config.json").read_text())
    assert config["rope_theta"] == 1.28e8
    assert (place / "runs/prolong-sft/report.html").stat().st_size > 1000
