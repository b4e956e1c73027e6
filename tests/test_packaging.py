"""What ships is what is in the repository, and the wheel alone does the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TOP_LEVEL = ("autotune", "profiler", "results", "runtime", "search_spaces")


def package_folders() -> dict[str, str]:
    """Import name -> folder, for every folder with an `__init__.py` below the top-level ones."""
    folders = [
        path.parent.relative_to(ROOT).as_posix()
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("__init__.py")
    ]
    return {f"nanoflow_tune.{folder.replace('/', '.')}": folder for folder in folders}


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves `build/` and `*.egg-info` where it works."""
    scratch = tmp_path_factory.mktemp("wheel")
    source = scratch / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *TOP_LEVEL):
        run("cp", "-r", ROOT / name, source, cwd=scratch)
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
        *("--outdir", scratch / "dist", source),
        cwd=scratch,
    )
    (path,) = (scratch / "dist").glob("*.whl")
    return path


def test_every_folder_with_an_init_is_a_package():
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())
    assert SETUPTOOLS["package-dir"] == package_folders()


@pytest.mark.parametrize("folder", TOP_LEVEL)
def test_every_top_level_package_is_typed(folder):
    assert (ROOT / folder / "py.typed").is_file()


def test_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].removesuffix(".dist-info") for name in names} == {
        "nanoflow_tune",
        f"nanoflow_tune-{PYPROJECT['project']['version']}",
    }
    for pattern in ("search_spaces/**/*.yaml", "results/profiles/**/*.csv", "*/py.typed"):
        for path in ROOT.glob(pattern):
            assert f"nanoflow_tune/{path.relative_to(ROOT).as_posix()}" in names


def test_installed_wheel_does_the_main_job_from_an_empty_directory(wheel, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"),
        *("--target", target, wheel),
        cwd=tmp_path,
    )
    where = "import nanoflow_tune.autotune as package; print(package.__file__)"
    located = run(sys.executable, "-c", where, cwd=empty, PYTHONPATH=str(target))
    assert located.stdout.startswith(str(target))

    result = run(
        *(sys.executable, "-m", "nanoflow_tune.autotune"),
        *("--model", "llama3-8b", "--buckets", "main", "--output-dir", "out"),
        cwd=empty,
        PYTHONPATH=str(target),
    )
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["model"] == "llama3-8b"
    assert (empty / report["plan"]).is_file()
