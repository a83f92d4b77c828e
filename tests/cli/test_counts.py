"""Counts of tokens are written and refused alike by all commands."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from megatron_prolong.cli.counts import at_least, each_at_least, of_domain
from megatron_prolong.cli.main import app

PACK = "data pack in out --mode concat"


def test_counts_are_read() -> None:
    assert (at_least(1)("64K"), each_at_least(16)("8k,512,8192")) == (65536, [512, 8192])
    assert (of_domain("0.5K"), of_domain("a=b=64")) == (("", 512), ("a=b", 64))


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [
        ("data tokenize in out --tokenizer here", "--max-chat-tokens", 1),
        ("data filter in out", "--min-length", 0),
        ("data filter in out", "--max-length", 0),
        (f"{PACK} --length 1K", "--min-length", 0),
        (f"{PACK} --length 1K", "--lengths", 1),
        (f"{PACK} --length 1K", "--overlap", 0),
        (PACK, "--length", 1),
        ("eval perplexity model --data here --out out", "--lengths", 16),
        ("eval needle model --out out", "--lengths", 16),
        ("eval run model --out out", "--lengths", 16),
        ("eval data check", "--lengths", 16),
        ("convert to-hf in out", "--max-length", 1),
    ],
)
def test_what_is_no_count_is_refused_in_one_way(command: str, option: str, least: int) -> None:
    for text, why in (
        ("64Q", "must be a number, such as"),
        ("0.3", "must be a whole number, such as"),
        (str(least - 1), f"must be at least {least} (8K is 8,192)"),
    ):
        found = CliRunner().invoke(app, [*command.split(), option, text])
        assert found.exit_code == 2
        assert f"Error: Invalid value for '{option}': {text}: {why}" in found.output
