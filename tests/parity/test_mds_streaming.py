"""Our MDS reader and writer against mosaicml-streaming, the package that defines the format.

Its files are committed (fixtures/, made by make_mds_fixtures.py), so reading them is always tested. That it
reads ours is tested where it is installed: here, or in another interpreter named by PROLONG_STREAMING_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_mds_fixtures import COLUMNS, COUNT, FIXTURES, VARIANTS, sample

from megatron_prolong.data.mds import MDSReader, MDSWriter

HERE = Path(__file__).parent
PYTHON = (
    sys.executable
    if importlib.util.find_spec("streaming")
    else os.environ.get("PROLONG_STREAMING_PYTHON", "")
)


def assert_equal_samples(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        elif name == "real":
            assert found[name] == np.float32(value)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_streaming_wrote(variant: str, tmp_path: Path) -> None:
    directory = tmp_path / variant
    shutil.copytree(FIXTURES / variant, directory)  # reading unpacks compressed shards beside them
    reader = MDSReader(directory)
    assert dict(reader.columns) == dict(sorted(COLUMNS.items()))
    assert len(reader) == COUNT
    for number, found in enumerate(reader):
        assert_equal_samples(found, sample(number))
    for number in range(len(reader.shards)):
        reader.verify(number)


@pytest.mark.parametrize("variant", VARIANTS)
def test_writes_the_bytes_that_streaming_writes(variant: str, tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "ours", COLUMNS, **VARIANTS[variant]) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(FIXTURES / variant, theirs)
    for directory in (theirs, ours):
        list(MDSReader(directory))  # unpacks
    raw = sorted(path.name for path in theirs.glob("*.mds"))
    assert raw == sorted(path.name for path in ours.glob("*.mds"))
    for name in raw:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    if "compression" not in VARIANTS[variant]:  # a compressor's bytes depend on its version
        assert json.loads((ours / "index.json").read_text()) == json.loads(
            (theirs / "index.json").read_text()
        )


READ_WITH_STREAMING = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from make_mds_fixtures import COUNT, sample
from streaming import StreamingDataset
for directory in sys.argv[2:]:
    data = StreamingDataset(local=directory, batch_size=1, validate_hash="xxh64")
    assert len(data) == COUNT, len(data)
    for number in range(COUNT):
        found, expected = data[number], sample(number)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = np.array_equal(found[name], value) if name != "real" else found[name] == np.float32(value)
            assert same, (directory, number, name, found[name], value)
print("equal")
"""


@pytest.mark.skipif(
    not PYTHON, reason="mosaicml-streaming is not installed, and PROLONG_STREAMING_PYTHON is not set"
)
def test_streaming_reads_what_we_wrote(tmp_path: Path) -> None:
    directories = []
    for compression in (None, "zstd:9", "gz", "bz2"):
        directories.append(str(tmp_path / str(compression)))
        options: dict = {"compression": compression, "hashes": ["xxh64"], "tokenizer": "0123456789abcdef"}
        with MDSWriter(directories[-1], COLUMNS, size_limit=900, **options) as writer:
            for number in range(COUNT):
                writer.write(sample(number))
    done = subprocess.run(
        [PYTHON, "-c", READ_WITH_STREAMING, str(HERE), *directories],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("equal")
