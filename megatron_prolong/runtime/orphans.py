"""A process whose launcher is killed does not stay behind, where it would wait for the others or train on."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def follow_launcher(number: signal.Signals) -> None:
    """Have Linux send us this signal when torch's agent dies, if that is who started us."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
