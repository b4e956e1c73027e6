"""Which inputs, which software and which commit a result was made from."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..profiler.profile import Profile

PACKAGE = "nanoflow-tune"
_SOLVERS = ("optuna", "pulp", "highspy", "numpy", "torch")


def commit() -> str:
    """The short commit of the checkout that this runs from, or that an installed version names.

    A version such as `0.1.0+g1a2b3c4` names one; "" when neither is known.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return _version(PACKAGE).partition("+g")[2]
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def created_by() -> str:
    """Tool, version and commit, as a plan records it."""
    named, source = _version(PACKAGE), commit()
    parts = (PACKAGE, named, "" if named.endswith(f"+g{source}") else source)
    return " ".join(part for part in parts if part)


def provenance(
    inputs: Mapping[str, str], profile: Profile | None, settings: Mapping[str, object]
) -> dict[str, str]:
    """Facts for the report: settings, content hashes, versions, the profile's header.

    Args:
        inputs: content hashes by input.
        profile: the profile, None for the roofline.
        settings: effort, seed and the like.
    """
    facts = {name: str(value) for name, value in settings.items()}
    facts |= {f"{name} hash": digest for name, digest in inputs.items()}
    facts["created by"] = created_by()
    facts["python"] = platform.python_version()
    facts["packages"] = ", ".join(f"{name} {_version(name)}" for name in _SOLVERS if _version(name))
    if profile is not None:
        facts |= {f"profile: {key}": value for key, value in profile.header.items()}
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
