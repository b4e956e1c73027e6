"""Keeps the HiGHS banner off the screen: standard output ends with JSON for other programs."""

from __future__ import annotations

import functools
import importlib
import os
import sys


@functools.cache
def silence_banner() -> None:
    """Make the process's first solver, which prints a banner from C++, with stdout turned away.

    Does nothing where HiGHS is not installed.
    """
    try:
        highspy = importlib.import_module("highspy")
    except ImportError:
        return
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
