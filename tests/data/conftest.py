from __future__ import annotations

from pathlib import Path

import pytest
from llama3 import llama3_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small tokenizer in the manner of Llama-3's; to be read only."""
    path = tmp_path_factory.mktemp("tokenizer")
    llama3_tokenizer().save_pretrained(path)
    return path
