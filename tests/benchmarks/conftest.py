"""Benchmark scripts import their neighbours by bare name, as `python benchmarks/x.py` does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROFILE = BENCHMARKS.parent / "results" / "profiles" / "h200" / "llama3-8b-tp1.csv"


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


@pytest.fixture(scope="session")
def search_only(tmp_path_factory):
    """What `SCRIPT.py --case 8b --search-only` stores; the scripts' common search runs once."""
    found = []

    def run(script, *arguments):
        path = tmp_path_factory.mktemp(script) / "schedules.yaml"
        before = set(sys.modules)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(BENCHMARKS))
            predictor = importlib.import_module("layer_cases").Predictor
            search = predictor.search

            def search_once(self):
                asked = (self.case.name, self.iteration, self.cost_model.profile)
                if asked not in [known for known, _ in found]:
                    found.append((asked, search(self)))
                return next(result for known, result in found if known == asked)

            patch.setattr(predictor, "search", search_once)
            options = ["--case", "8b", "--profile", str(PROFILE), "--search-only", str(path)]
            patch.setattr(sys, "argv", [f"{script}.py", *options, *arguments])
            importlib.import_module(script).main()
        for name in {stem.stem for stem in BENCHMARKS.glob("*.py")} & (set(sys.modules) - before):
            del sys.modules[name]
        return path

    return run
