"""How the program ends, whatever the command."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from megatron_prolong.cli import main


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


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ESTALE, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.ENOSPC, 2)]
)
def test_a_fault_that_passes_does_not_end_with_the_code_of_what_stays(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch script starts nothing again after 2."""

    def a_command(**_: object) -> None:
        raise OSError(number, os.strerror(number), "/data/shard")

    monkeypatch.setattr(main, "app", a_command)
    with pytest.raises(SystemExit) as left:
        main._run()
    assert left.value.code == code
    assert capsys.readouterr().err == f"error: /data/shard: {os.strerror(number)} (--debug shows where)\n"
