"""A small recipe whose model, tokenizer and data exist, to be broken by the tests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prolong.cli import main
from megatron_prolong.recipe.shape import ModelShape, to_hf_config

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=300,
    max_length=512,
    rope_base=5e5,
)


ENCODINGS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "mask": "ndarray:uint8"}


def describe_checkpoint(directory: Path, kind: str, shape: ModelShape, **fields: object) -> None:
    """Write the description of a checkpoint into a directory that is there."""
    manifest = {
        "format": 1,
        "kind": kind,
        "shape": shape.to_dict(),
        "dtype": "bfloat16",
        "stage": None,
        "step": 0,
        "layout": {"distributed_optimizer": True},
        **fields,
    }
    (directory / "prolong.json").write_text(json.dumps(manifest))


def write_checkpoint(directory: Path, shape: ModelShape = SHAPE) -> None:
    """The newest checkpoint of a stage, with everything but weights."""
    write_tokenizer(directory / "hf", shape.vocab_size)
    describe_checkpoint(directory, "training", shape)
    (directory / ".metadata").touch()
    (directory.parent / "latest").write_text(f"{directory.name}\n")


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, holding model/, books/ (with a mask column), code/ (without) and a link to that."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_domain(tmp_path / "books", ["domain", "indices", "input_ids", "length", "mask"])
    write_domain(tmp_path / "code", ["domain", "indices", "input_ids", "length"])
    (tmp_path / "link").symlink_to("code")
    return tmp_path


@pytest.fixture
def recipe_data() -> dict[str, Any]:
    """A recipe without a mistake, as plain data: two stages of 8 sequences."""
    return {
        "name": "tiny",
        "model": {"path": "model"},
        "stages": [
            {
                "name": "one",
                "sequence_length": "1K",
                "batch_tokens": "8K",
                "steps": 10,
                "lr": "1e-5",
                "mixture": {"books": 0.25, "code": 0.75},
            },
            {
                "name": "two",
                "sequence_length": "4K",
                "rope_base": "8e6",
                "batch_tokens": "32K",
                "tokens": "1M",
                "lr": "5e-6",
                "mixture": {"books": 1.0},
            },
        ],
    }


@pytest.fixture
def write(workdir: Path) -> Callable[..., Path]:
    """Writes data as a recipe file and returns its path, relative to the working directory."""

    def write_file(data: object, name: str = "recipe.yaml") -> Path:
        Path(name).write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
        return Path(name)

    return write_file


@pytest.fixture
def prolong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Runs `prolong ARGUMENTS`; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["prolong", *map(str, arguments)])
        try:
            main.run()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_model(directory: Path, shape: ModelShape = SHAPE, vocabulary: int | None = None) -> None:
    """A Hugging Face directory that has everything but real weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_hf_config(shape)))
    (directory / "model.safetensors").write_bytes(b"")
    write_tokenizer(directory, vocabulary or shape.vocab_size)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """tokenizer.json with `vocabulary` ids, the last one an added token."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "model": {"vocab": {f"t{number}": number for number in range(vocabulary - 1)}},
        "added_tokens": [{"id": vocabulary - 1, "content": "<|end|>"}],
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))


def write_domain(
    directory: Path, columns: list[str], samples: int = 3, encodings: Mapping[str, str] = ENCODINGS
) -> None:
    """index.json of a directory of MDS shards."""
    directory.mkdir(parents=True)
    shard = {
        "format": "mds",
        "version": 2,
        "column_names": columns,
        "column_encodings": [encodings.get(name, "str") for name in columns],
        "column_sizes": [None for _ in columns],
        "compression": None,
        "raw_data": {"basename": "shard.00000.mds", "bytes": 0},
        "samples": samples,
    }
    (directory / "shard.00000.mds").touch()
    (directory / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
