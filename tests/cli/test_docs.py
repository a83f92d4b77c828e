"""README and docs: the commands, options and files that they name exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from megatron_prolong.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])


def command_lines(page: Path) -> list[str]:
    """Lines of code blocks that start with `prolong`, whole where they go on after a backslash."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in found if line.startswith("prolong ")]


def parse(line: str) -> None:
    """Let the command's own parser read the line, without running it."""
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup):
        if words[0] == "--compare":  # `prolong eval --compare` is `prolong eval compare`
            words[0] = "compare"
        context = command.context_class(command)
        _, command, words = command.resolve_command(context, words)
        assert command is not None
    command.make_context("prolong", words)


@pytest.mark.parametrize("line", [line for page in PAGES for line in command_lines(page)])
def test_the_command_exists(line: str) -> None:
    parse(line)


def commands(group: TyperGroup) -> Iterator[Any]:
    """All commands below a group."""
    for command in group.commands.values():
        yield from commands(command) if isinstance(command, TyperGroup) else [command]


def test_help_names_what_to_put_in_capitals() -> None:
    main = typer.main.get_command(app)
    assert isinstance(main, TyperGroup)
    arguments = [
        one for command in commands(main) for one in command.params if one.param_type_name == "argument"
    ]
    assert [one.name for one in arguments if not (one.metavar or "").isupper()] == []


def links(page: Path) -> list[Path]:
    """Files that a page leads to."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    return [page.parent / target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [str(target) for target in links(page) if not target.exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    assert {target.resolve() for target in links(ROOT / "README.md")} >= set(ROOT.glob("docs/*.md"))


def test_there_are_commands() -> None:
    assert sum(len(command_lines(page)) for page in PAGES) > 40


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("prolong data pak a b", "pak"),
        ("prolong plan a --gpsu 8", "gpsu"),
        ("prolong eval a --suite b", "out"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, wrong: str) -> None:
    with pytest.raises(Exception, match=wrong):
        parse(line)
