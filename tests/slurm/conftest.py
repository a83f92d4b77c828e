"""A real Slurm for the tests of this directory."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two nodes, as tools/local_slurm.sh starts them. Skips where they cannot run: they need root."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"not installed: {', '.join(missing)}" if missing else "slurmctld and slurmd need root here"
        )
    directory = tmp_path_factory.mktemp("slurm")
    tool = ROOT / "tools" / "local_slurm.sh"
    # In the container of a CI job munge or the ports may be out of reach; that is no fault of ours.
    started = subprocess.run([tool, "start", directory], capture_output=True, text=True, timeout=60)
    if started.returncode:
        pytest.skip(f"no local Slurm: {started.stderr.strip()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{directory}/slurm.conf")
        yield
    subprocess.run([tool, "stop", directory], check=True, timeout=60)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer in which bytes are tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
