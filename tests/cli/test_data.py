"""Every option of `prolong data` reaches the step that it is for, under the same name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.data import filter as filter_module
from megatron_prolong.data import group as group_module
from megatron_prolong.data import pack as pack_module
from megatron_prolong.data import tokenize as tokenize_module
from megatron_prolong.data.executors import LocalProcesses, Ray
from megatron_prolong.data.filter import FilterOptions
from megatron_prolong.data.group import GroupOptions
from megatron_prolong.data.pack import PackOptions
from megatron_prolong.data.tokenize import TokenizeOptions
from megatron_prolong.errors import UserError

GROUP, TOKENIZE, FILTER, PACK = (
    (group_module, "group"),
    (tokenize_module, "tokenize"),
    (filter_module, "filter_documents"),
    (pack_module, "pack"),
)


@pytest.mark.parametrize(
    ("command", "step", "options"),
    [
        ("group --by b", GROUP, GroupOptions("b")),
        (
            "group --by b --path-field p --kind parquet --text-field x --on-bad-input skip",
            GROUP,
            GroupOptions("b", "p", "parquet", "x", "skip"),
        ),
        ("tokenize --tokenizer t", TOKENIZE, TokenizeOptions(domain="out")),
        (
            "tokenize --tokenizer t --kind parquet --domain d --domain-field e --text-field x --on-bad-input skip",
            TOKENIZE,
            TokenizeOptions("parquet", "d", "e", "x", on_bad_input="skip"),
        ),
        (
            "tokenize --tokenizer t --messages-field m --chat --max-chat-tokens 1K",
            TOKENIZE,
            TokenizeOptions(domain="out", messages_field="m", chat=True, max_chat_tokens=1024),
        ),
        ("filter --duplicates", FILTER, FilterOptions(duplicates=True)),
        (
            "filter --min-length 2 --min-length a=3 --max-length 1K --max-length b=5 --against e --against f "
            "--ngram 6 --hits 7 --predicate m:f --tokenizer t",
            FILTER,
            FilterOptions({"": 2, "a": 3}, {"": 1024, "b": 5}, False, ("e", "f"), 6, 7, "m:f", "t"),
        ),
        ("pack --length 1K --mode concat --intact", PACK, PackOptions(1024, "concat", intact=True)),
        (
            "pack --length 1K --mode single --min-length 2 --lengths 256,512 --overlap 3 --bos 4 --eos 5 "
            "--shuffle-seed 6 --domain d",
            PACK,
            PackOptions(1024, "single", 2, (256, 512), 3, False, 4, 5, 6, "d"),
        ),
    ],
)
def test_options_reach_their_step(
    command: str, step: tuple[ModuleType, str], options: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is dropped on the way would be missed by nobody: `--against` finds nothing then."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setattr(*step, lambda *args, **how: asked.append((args, how)))
    name, *words = command.split()
    for where in (["--workers", "3", "--slurm-array"], ["--executor", "ray"]):
        result = CliRunner().invoke(app, ["data", name, "a", "b", "out", *words, *where])
        assert result.exit_code == 0 and "out appears when the other jobs are done" in result.output
    tokenizer = [Path("t")] if name == "tokenize" else []
    for args, _ in asked:
        assert list(args) == [["a", "b"], *tokenizer, Path("out"), options]
    local, ray = (how for _, how in asked)
    assert local["executor"] == LocalProcesses(3) and local["slurm"]["SLURM_ARRAY_TASK_ID"] == "8"  # type: ignore[index]
    assert ray == {"executor": Ray(), "slurm": None}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tokenize --tokenizer t --max-chat-tokens 1K", "--max-chat-tokens 1024 is for chats"),
        ("tokenize --tokenizer t --messages-field messages", "--messages-field messages is for chats: add"),
        ("tokenize --tokenizer t --chat --text-field a.b", "--text-field a.b: chats have --messages-field"),
        ("tokenize --tokenizer t --kind chat --text-field text", "--text-field text: chats have"),
        ("filter --duplicates --ngram 13", "--ngram and --hits are for --against"),
        ("filter --duplicates --hits 1", "--ngram and --hits are for --against"),
        (
            "filter --min-length 8 --min-length 1K",
            "--min-length: given twice for all domains (8 and 1,024 tokens)",
        ),
        ("filter --max-length a=8 --max-length a=9", "--max-length: given twice for a (8 and 9 tokens)"),
        ("filter --duplicates --executor ray --workers 3", "--workers 3: Ray's cluster says"),
        ("pack --length 1K --mode concat --intact --overlap 3", "overlap 3 has no effect with intact"),
    ],
)
def test_an_option_without_effect_is_refused(command: str, message: str) -> None:
    """Also one that has its default's value: whoever gives it believes that documents are compared."""
    name, *words = command.split()
    error = CliRunner().invoke(app, ["data", name, "in", "out", *words]).exception
    assert isinstance(error, UserError) and message in str(error)


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("group --by b", GROUP),
        ("tokenize --tokenizer t", TOKENIZE),
        ("filter --duplicates", FILTER),
        ("pack --length 1K --mode concat", PACK),
    ],
)
def test_an_interrupted_job_says_that_it_can_go_on(
    command: str, step: tuple[ModuleType, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*step, interrupted)
    name, *words = command.split()
    found = CliRunner().invoke(app, ["data", name, "in", "out", *words])
    assert "stopped; the same command continues from what is finished\n" in found.output
