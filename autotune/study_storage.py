"""Where Optuna studies are kept: an RDB by URL (SQLite, PostgreSQL, MySQL), or a journal file.

Several workers, on other GPUs or hosts, may hold one storage open at the same time. Each notes on
a trial who runs it, so that a trial whose worker was killed is tried again.
"""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal:"
LOST_AFTER = timedelta(hours=1)
"""A trial of another host that runs for longer has lost its worker."""
_WORKER = "worker"
_ATTEMPTS, _PAUSE_S = 10, 0.5
"""At opening a database whose tables another worker is making."""
_BUSY_S = 60
"""How long a worker waits while another one writes to the same SQLite file."""


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage that a user names.

    Args:
        url: `sqlite:///FILE`, another SQLAlchemy URL, or `journal:FILE`.

    Raises:
        ValueError: it names nothing that can be opened.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        if url.startswith(JOURNAL):
            path = Path(url.removeprefix(JOURNAL))
            if path.is_dir() or not path.name or not path.parent.is_dir():
                raise ValueError(f"{str(path)!r} must be a file in a folder that exists")
            return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        return _database(url)
    except (ValueError, OSError, ImportError, *_database_errors()) as err:
        reason = without_password(str(err).splitlines()[0])
        raise ValueError(
            "--storage must be sqlite:///FILE, journal:FILE, or the URL of a database that answers "
            f"and whose driver is installed, but got {without_password(url)!r} ({reason})"
        ) from err


def _database(url: str) -> optuna.storages.RDBStorage:
    """The database, whose tables may be made by another worker at this moment."""
    import optuna

    arguments = {"timeout": _BUSY_S} if url.startswith("sqlite") else {}
    for left in reversed(range(_ATTEMPTS)):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": arguments})
        except _database_errors() as err:
            is_made = "already exists" in str(err) or "alembic_version" in str(err)
            if not is_made or not left:
                raise
            time.sleep(_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def _database_errors() -> tuple[type[Exception], ...]:
    import optuna
    import sqlalchemy.exc

    return sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError


def without_password(text: str) -> str:
    """The text with what stands before the host of its URLs hidden."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def mark(trial: optuna.Trial) -> None:
    """Note on a trial who runs it."""
    trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")


def retry_lost(study: optuna.Study) -> None:
    """Fail the trials whose worker is gone, and have the study ask for them again."""
    import optuna

    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if _is_lost(trial):
            study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
            parameters = trial.system_attrs.get("fixed_params", trial.params)
            if parameters:
                study.enqueue_trial(dict(parameters), user_attrs={"retries": trial.number})


def _is_lost(trial: optuna.trial.FrozenTrial) -> bool:
    host, _, process = str(trial.user_attrs.get(_WORKER, "")).rpartition(":")
    if host == socket.gethostname():
        return not _is_alive(int(process))
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > LOST_AFTER


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
