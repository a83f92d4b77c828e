"""What a second run into the same place does with the results of the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.suite import refuse_another_model


@pytest.mark.parametrize(
    ("model", "identity", "taken"),
    [("A/64k", "new", True), ("moved", "x", True), ("B/64k", "y", False), ("served", "", False)],
)
def test_a_folder_holds_the_results_of_one_model(
    model: str, identity: str, taken: bool, tmp_path: Path
) -> None:
    """Both may be called 64k, after the last part of their paths."""
    (tmp_path / "short.json").write_text("{}")
    arguments = {"model_name_or_path": "A/64k", "model_identity": "x"}
    (tmp_path / "json_kv.json").write_text(json.dumps({"args": arguments}))
    if taken:
        refuse_another_model(tmp_path, model, identity)
    else:
        with pytest.raises(UserError, match="another model, A/64k; name this one"):
            refuse_another_model(tmp_path, model, identity)
