import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from llama3 import llama3_tokenizer
from packs import numbered_packs, record_tokenizer, write_packs

from megatron_prolong.cli.data_inspect import register
from megatron_prolong.data.mds import MDSReader
from megatron_prolong.data.megatron_indexed import IndexedWriter
from megatron_prolong.errors import UserError


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    return write_packs(tmp_path / "packs", numbered_packs(8), size_limit=300, hashes=["xxh64"])


def test_inspect_prints_tables_and_writes_the_image(packs: Path, tmp_path: Path) -> None:
    result = run("inspect", packs, "--png", tmp_path / "lengths.png")
    assert result.exit_code == 0, result.output
    assert "Domains" in result.output and "Document lengths" in result.output
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png", "packs"]
    assert isinstance(run("inspect", packs, "--png", tmp_path / "lengths.svg").exception, UserError)
    assert "tokenizer" not in result.output
    record_tokenizer(packs)
    assert "fingerprint of the tokenizer: 0123456789abcdef" in run("inspect", packs).output


def test_inspect_shows_samples_as_text(packs: Path, tmp_path: Path) -> None:
    llama3_tokenizer().save_pretrained(tmp_path / "tokenizer")
    result = run("inspect", packs, "--sample", 2, "--sample", 5, "--tokenizer", tmp_path / "tokenizer")
    assert result.exit_code == 0, result.output
    assert "sample 2 ·" in result.output and "sample 5 ·" in result.output
    assert result.output.count("── document 2 of 2 · 4 tokens ──") == 2
    assert "… 2 tokens …" not in result.output
    short = run("inspect", packs, "--sample", 2, "--tokenizer", tmp_path / "tokenizer", "--max-tokens", 2)
    assert "… 2 tokens …" in short.output
    assert "needs --tokenizer" in str(run("inspect", packs, "--sample", 0).exception)
    without = run("inspect", packs, "--tokenizer", tmp_path / "tokenizer").exception
    assert isinstance(without, UserError) and "--tokenizer is for --sample NUMBER" in str(without)
    alone = run("inspect", packs, "--max-tokens", 2).exception
    assert isinstance(alone, UserError) and "--max-tokens 2 is for --sample NUMBER" in str(alone)
    both = run("inspect", packs, "--sample", 0, "--tokenizer", "t", "--png", tmp_path / "all.png").exception
    assert isinstance(both, UserError) and "give one of them" in str(both)
    missing = run("inspect", packs, "--sample", 0, "--tokenizer", tmp_path / "absent").exception
    assert isinstance(missing, UserError) and "absent: no tokenizer.json there; give the directory" in str(
        missing
    )
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "tokenizer").rename(tmp_path / "checkpoint" / "hf")
    result = run("inspect", packs, "--sample", 2, "--tokenizer", tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    record_tokenizer(packs)
    for command in (["inspect", packs, "--sample", 0], ["verify", packs]):
        other = run(*command, "--tokenizer", tmp_path / "checkpoint").exception
        assert isinstance(other, UserError) and "are of different tokenizers" in str(other)


def test_mixture_shows_how_often_domains_repeat(packs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stage = "{name: %s, sequence_length: 8, batch_tokens: 32, steps: 5, lr: 1e-5, mixture: %s}"
    recipe.write_text(
        "name: test\nmodel: {path: absent}\nstages:\n"
        f"  - {stage % ('long', f'{{{packs}: 1.0}}')}\n  - {stage % ('speed', 'mock')}\n"
    )
    result = run("mixture", recipe)
    assert result.exit_code == 0, result.exception
    # The path is folded where it is long: 5 steps of 4 draws from 8 samples are two and a half epochs.
    assert re.search(r"100\.0%\s+8\s+20\s+2\.50", result.output)
    assert "Stage long: 5 steps of 4 sequences" in result.output and "speed: mock" in result.output
    error = run("mixture", recipe, "stage.long.sequence_length=4", "stage.speed.sequence_length=4").exception
    assert isinstance(error, UserError) and "stage long: the mixture cannot be read" in str(error)
    next(packs.glob("*.mds")).unlink()
    error = run("mixture", recipe).exception
    assert isinstance(error, UserError) and "stage long: data is not there as a whole" in str(error)


def test_mixture_refuses_data_of_another_tokenizer_than_the_models(packs: Path, tmp_path: Path) -> None:
    llama3_tokenizer().save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: test\nmodel: {{path: {tmp_path / 'model'}}}\nstages:\n  - {{name: long, sequence_length: 8, "
        f"batch_tokens: 32, steps: 5, lr: 1e-5, mixture: {{{packs}: 1.0}}}}\n"
    )
    assert run("mixture", recipe).exit_code == 0
    record_tokenizer(packs)
    error = run("mixture", recipe).exception
    assert isinstance(error, UserError) and "stage long: " in str(error)
    assert "model and its data are of different tokenizers (fingerprints " in str(error)


def test_verify_lists_all_damage(packs: Path) -> None:
    assert "8 shards, 8 samples, nothing wrong" in run("verify", packs).output
    for number in (2, 6):
        (packs / f"shard.{number:05}.mds").unlink()
    error = run("verify", packs).exception
    assert isinstance(error, UserError)
    assert "shard.00002.mds" in str(error) and "shard.00006.mds" in str(error)


def test_verify_knows_the_vocabulary_and_admits_missing_hashes(tmp_path: Path) -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    directory = write_packs(tmp_path / "d", [[[len(tokenizer)]]])
    said = run("verify", directory).output
    assert "1 of 1 shard without a hash" in said and ": 1 shard, 1 sample, nothing wrong" in said
    error = run("verify", directory, "--tokenizer", tmp_path / "tokenizer").exception
    assert isinstance(error, UserError) and f"token {len(tokenizer)} at position 0" in str(error)


def test_to_megatron_and_back(packs: Path, tmp_path: Path) -> None:
    assert "8 documents" in run("to-megatron", packs, tmp_path / "tokens").output
    assert "8 samples" in run("from-megatron", tmp_path / "tokens", tmp_path / "back").output
    for one, other in zip(MDSReader(packs), MDSReader(tmp_path / "back"), strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
        assert other["domain"] == "tokens"
    with IndexedWriter(tmp_path / "written") as writer:
        for length in (3, 0):
            writer.write(np.zeros(length, np.uint32), np.array([length]))
    result = run("from-megatron", tmp_path / "written", tmp_path / "web", "--domain", "web")
    assert "web: 1 sample (1 empty document left out)" in result.output
    assert [sample["domain"] for sample in MDSReader(tmp_path / "web")] == ["web"]
