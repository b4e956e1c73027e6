"""Keeps the HiGHS banner off standard output, whose last line is JSON for other programs."""

from __future__ import annotations

import functools
import importlib
import os
import sys


@functools.cache
def send_banner_to_stderr() -> None:
    """Make the process's first solver, which prints a banner from C++, with stdout turned away.

    Does nothing where HiGHS is not installed.
    """
    try:
        highspy = importlib.import_module("highspy")
    except ImportError:
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
