"""How the program ends, whatever the command."""

import os
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


def test_what_is_printed_is_utf_8_in_every_locale() -> None:
    """An arrow, or the name of a file, ended a run where the locale is of before 2000."""
    code = r"""
from megatron_prolong.cli import main
main.app = lambda **_: print("64k \u2192 512k", "\udcff")
main.run()
"""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.decode() == "64k → 512k \\udcff\n"
