"""The environment of GPU runs, and the collector that all ranks run at the same moment."""

import gc
import os
import subprocess
import sys

import pytest

from megatron_prolong.runtime.garbage import collected_by_hand
from megatron_prolong.runtime.gpu_environment import GPU_ENVIRONMENT, set_gpu_environment


def test_what_the_user_has_set_stays(monkeypatch):
    for name in GPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    set_gpu_environment()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_command_finds_it_before_it_imports_torch():
    """Whose compiler reads its variable once, as it is imported."""
    code = """
import sys
from megatron_prolong.cli import main
main.app = lambda **_: None
main.run()
assert "torch" not in sys.modules
import torch._inductor.config
print(torch._inductor.config.compile_threads)
"""
    environment = {name: value for name, value in os.environ.items() if name not in GPU_ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_waits_until_it_is_collected_and_the_collector_is_restored():
    old = Knot()
    with pytest.raises(ValueError, match="a step failed"), collected_by_hand():
        assert not gc.isenabled()
        Knot()
        assert any(isinstance(thing, Knot) and thing is not old for thing in gc.get_objects())
        gc.collect()
        assert not any(isinstance(thing, Knot) for thing in gc.get_objects())  # the old one is not looked at
        raise ValueError("a step failed")
    assert gc.isenabled()
    assert old in [thing for thing in gc.get_objects() if isinstance(thing, Knot)]
