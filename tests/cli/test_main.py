"""How the program ends, whatever the command."""

import signal
import subprocess
import sys


def test_a_crash_below_python_says_where() -> None:
    """A shard that the file server no longer gave ended a rank with the shell's "Bus error" and nothing else."""
    code = """
import os, signal
from megatron_prolong.cli import main
def a_command(**_):
    os.kill(os.getpid(), signal.SIGBUS)
main.app = a_command
main.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr and "in a_command" in done.stderr
