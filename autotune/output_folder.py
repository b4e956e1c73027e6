"""Where a job's files go: written aside first, moved in at once, never over a different job.

One run at a time holds a folder (`held`). It writes into `.unfinished-*`; the renaming of that to
`.finished` is the one moment at which the job is done. Moving its files into place is repeatable,
so a run that was killed meanwhile is completed by the next one. `report.json` is moved last: a
folder that has it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..search_spaces.records import read_bounded

DOCUMENT = "report.json"
FILES = (
    "plan.yaml",
    "timeline.png",
    "sm_curves.png",
    "roofline.png",
    "pairs.png",
    "history.png",
    "trace.json",
    "search.db",
    "report.html",
    DOCUMENT,
)
"""Everything that a job may write, in the order it is moved in."""
_IDENTITY = ("model", "hardware", "workload", "num_gpus")
_LOCK, _FINISHED, _UNFINISHED = ".lock", ".finished", ".unfinished-"
_LIST = ".files"
"""In a staged folder that is finished: the names of its files."""


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
    if not present or (folder / _FINISHED).is_dir():
        return ""  # nothing, or what the next run completes first
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
        document: Any = json.loads(read_bounded(path).decode("utf-8"))
    except FileNotFoundError as err:
        raise ValueError(
            f"{folder} must hold the {DOCUMENT} of a finished job, but has none; name a folder "
            "that nanoflow-tune wrote"
        ) from err
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path} cannot be read ({err}); run the job again") from err
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object; run the job again")
    return document


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Keep other runs out of an output folder, and first put right what a killed run left there.

    The system frees the lock when its process ends, however it ends. Folders that this made are
    removed where they are empty in the end.

    Raises:
        ValueError: `folder` is a file, or another run is writing there.
        OSError: the folder cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir must be a folder, but {folder} is a file; name another")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / _LOCK
    descriptor = _locked(lock, folder)
    try:
        for left in folder.glob(f"{_UNFINISHED}*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        if (folder / _FINISHED).is_dir():
            _move_in(folder)
        yield
    finally:
        try:
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        for folder_made in made:  # the innermost first
            with suppress(OSError):  # holds something
                folder_made.rmdir()


def _locked(lock: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(
                f"one run at a time writes to an output folder, but process {holder} is writing to "
                f"{folder}; wait for it, or name another folder with --output-dir"
            ) from err
        # The last holder may have removed the file between our opening and locking it.
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """A folder to write into; on success its files move to `folder`, on failure it vanishes.

    Args:
        folder: exists, and is `held` by this run.
    """
    aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield aside
        names = [name for name in FILES if (aside / name).exists()]
        (aside / _LIST).write_text("\n".join(names) + "\n", encoding="utf-8")
        aside.rename(folder / _FINISHED)
        _move_in(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_in(folder: Path) -> None:
    """Move the files of `.finished` to their places; may be cut off anywhere and called again."""
    finished = folder / _FINISHED
    names = (finished / _LIST).read_text(encoding="utf-8").split()
    if any((finished / name).exists() for name in names):
        (folder / DOCUMENT).unlink(missing_ok=True)
    for name in FILES:
        if (finished / name).exists():
            (finished / name).replace(folder / name)
        elif name not in names:
            (folder / name).unlink(missing_ok=True)
    done = folder / f"{_UNFINISHED}{_FINISHED}"
    finished.rename(done)  # removing it takes more than one step
    shutil.rmtree(done, ignore_errors=True)
