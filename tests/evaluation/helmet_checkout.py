"""Where HELMET's own program is, for tests that compare with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HELMET = Path(os.environ.get("HELMET", "missing"))
needs_helmet = pytest.mark.skipif(not (HELMET / "data.py").exists(), reason="HELMET=checkout not given")
