"""Benchmark scripts import their neighbours by bare name, as `python benchmarks/x.py` does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script of `benchmarks/` by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ours = {path.stem for path in BENCHMARKS.glob("*.py")}

    def module(name):
        return importlib.import_module(name)

    yield module
    for name in ours & set(sys.modules):
        del sys.modules[name]
