"""Our packs against those of CodeCreator/datatools, ProLong's own program, where the two agree on the rules.

The expected packs are committed (fixtures/pack_vectors.json, made by make_pack_vectors.py with datatools).
Its options map as: none → concat, intact → concat intact, split_by_lengths → single with lengths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.pack import PackOptions, pack

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "pack_vectors.json").read_text())


def ours(options: dict[str, Any]) -> PackOptions:
    return PackOptions(
        length=options["pack_length"],
        mode="single" if "split_by_lengths" in options else "concat",
        lengths=tuple(options.get("split_by_lengths", ())),
        min_length=options.get("min_length", 1),
        overlap=options.get("overlap", 0),
        intact=options.get("intact", False),
        bos=options.get("bos_id"),
        eos=options.get("eos_id"),
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: json.dumps(vector["options"]))
def test_packs_equal_datatools(vector: dict[str, Any], tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "documents", {"input_ids": "ndarray:uint32"}) as writer:
        for number, length in enumerate(vector["lengths"], 1):
            writer.write({"input_ids": (number * 1000 + np.arange(length)).astype(np.uint32)})
    report = pack([tmp_path / "documents"], tmp_path / "packs", ours(vector["options"]))
    assert report is not None and report.balances
    expected: dict[str, list[Any]] = {}
    for each in vector["packs"]:
        expected.setdefault("" if each["subset"] == "." else each["subset"], []).append(each)
    assert report.packs == {subset: len(packs) for subset, packs in expected.items()}
    for subset, packs in expected.items():
        found = list(MDSReader(tmp_path / "packs" / subset))
        assert [each["input_ids"].tolist() for each in found] == [each["input_ids"] for each in packs]
        assert [each["indices"].tolist() for each in found] == [each["indices"] for each in packs]
        assert [each["length"] for each in found] == [each["length"] for each in packs]
