"""Where a job's files go: written aside first, moved in at once, never over a different job.

`report.json` is moved last: a folder that has it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCUMENT = "report.json"
FILES = (
    "plan.yaml",
    "timeline.png",
    "sm_curves.png",
    "roofline.png",
    "pairs.png",
    "trace.json",
    "search.db",
    "report.html",
    DOCUMENT,
)
"""Everything that a job may write, in the order it is moved in."""
_IDENTITY = ("model", "hardware", "workload", "num_gpus")


def claim(folder: Path, identity: Mapping[str, object], *, is_measured: bool) -> str:
    """Check that a job may write here; say what it replaces, "" for nothing.

    Args:
        folder: the output folder; it need not exist.
        identity: model, hardware, workload and num_gpus of the job.
        is_measured: whether the job measures on a GPU.

    Raises:
        ValueError: the folder holds another job, or files that no finished job wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir must be a folder, but {folder} is a file; name another")
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        return ""
    if DOCUMENT not in present:
        raise ValueError(
            f"an output folder holds one finished job, but {folder} holds {', '.join(present)} and "
            f"no {DOCUMENT}; name another with --output-dir"
        )
    earlier = read_document(folder)
    for key in _IDENTITY:
        if earlier.get(key) != identity[key]:
            raise ValueError(
                f"an output folder holds one job, but {folder} holds {key} {earlier.get(key)!r} "
                f"and this job has {identity[key]!r}; name another with --output-dir"
            )
    if earlier.get("source") == "measured" and not is_measured:
        raise ValueError(
            f"a measured result is not replaced by a predicted one, but {folder} holds a measured "
            "one and this run has no GPU; name another folder with --output-dir"
        )
    return f"replaces the earlier {earlier.get('source')} result of the same job"


def read_document(folder: Path) -> dict[str, Any]:
    """The `report.json` of a finished job.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / DOCUMENT
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ValueError(
            f"{folder} must hold the {DOCUMENT} of a finished job, but has none; name a folder "
            "that nanoflow-tune wrote"
        ) from err
    except (OSError, ValueError) as err:
        raise ValueError(f"{path} cannot be read ({err}); run the job again") from err
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object; run the job again")
    return document


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """A folder to write into; on success its files move to `folder`, on failure it vanishes."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield aside
        (folder / DOCUMENT).unlink(missing_ok=True)
        for name in FILES:
            if (aside / name).exists():
                (aside / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
