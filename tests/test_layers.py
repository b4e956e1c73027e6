"""The search runs on a laptop: nothing it needs imports torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanoflow_tune.autotune

TORCH_FREE = (
    *(
        f"nanoflow_tune.autotune.{module.name}"
        for module in pkgutil.iter_modules(nanoflow_tune.autotune.__path__)
        if module.name != "__main__"
    ),
    "nanoflow_tune.profiler.profile",
    "nanoflow_tune.runtime.op_graph",
    "nanoflow_tune.runtime.plan",
    "nanoflow_tune.runtime.schedule",
    "nanoflow_tune.search_spaces.loader",
)


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_search_and_records_import_no_torch(tmp_path):
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", TORCH_FREE)
def test_each_module_imports_alone(name, tmp_path):
    """No module leans on another having been imported before it (circular imports)."""
    result = run_python(f"import {name}", tmp_path)
    assert result.returncode == 0, result.stderr
