"""Tasks of lm-evaluation-harness that need no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = """\
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
test_split: test
fewshot_split: test
"""


def write_tasks(directory: Path, tasks: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """NAME.yaml of each task, the rest of whose lines are given, on the same rows."""
    file = directory / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in tasks.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{DATA.replace('FILE', str(file))}{lines}")
