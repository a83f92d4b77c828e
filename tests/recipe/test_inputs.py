"""Files that a recipe points at are read as often as needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prolong.recipe import inputs
from megatron_prolong.recipe.inputs import tokenizer_fingerprint, tokenizer_problems, vocabulary_size


def test_a_tokenizer_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    read, reads = inputs.read_json, []
    monkeypatch.setattr(inputs, "read_json", lambda path: reads.append(path) or read(path))
    before = tokenizer_fingerprint(tmp_path)
    assert (vocabulary_size(tmp_path), tokenizer_problems(tmp_path), reads) == (2, [], [file])
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    assert vocabulary_size(tmp_path) == 3 and tokenizer_fingerprint(tmp_path) != before
    assert reads == [file] * 2
