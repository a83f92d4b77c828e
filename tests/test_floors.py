"""Imports go down only, and only mcore/ knows Megatron and Transformer Engine (docs: ARCHITECTURE of the house)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_prolong"
FLOORS = {
    "errors": -1, "deal": -1, "page": 0, "recipe": 0, "runtime": 0,
    "data": 1, "model": 1,
    "convert": 2, "plan": 2,
    "mcore": 3,
    "training": 4, "evaluation": 4, "report": 4,
    "cli": 5,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports anywhere, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for module in imported_modules(path):
        if module.startswith("megatron_prolong."):
            other = module.split(".")[1]
            allowed = other == room or FLOORS[other] < FLOORS[room]
            assert allowed, f"{path}: {room} must not import {other}"
        if module.split(".")[0] in ("megatron", "transformer_engine"):
            assert room == "mcore", f"{path} imports {module}; only mcore/ may"


def test_every_room_is_on_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize("room", ["recipe", "plan", "cli.main"])
def test_rooms_that_must_start_without_torch(room):
    code = f"import sys, megatron_prolong.{room}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
