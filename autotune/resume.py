"""What an interrupted run leaves for the next one: what was measured, and the finished search.

Beside the points of the book (`book_store.py`), and like them only for equal inputs. A search is
deterministic, so one that is run again asks for the same schedules in the same order: those that
were measured are answered from the file, up to the place where it was cut off. A search that was
finished is taken over whole, with its study. The files go with the run's success; measurements,
which cost time on a GPU, also survive its failure.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.plan import Schedule, Timing
from ..search_spaces.records import (
    SpecError,
    content_hash,
    from_mapping,
    read_bounded,
    to_mapping,
)
from ..search_spaces.whole_file import write_whole
from .book_store import kept_mapping
from .search import SearchResult

Measure = Callable[[Sequence[Schedule]], Sequence[Timing]]
MEASURED, SEARCH, STUDY = (
    ".unfinished-measured.jsonl",
    ".unfinished-search.json",
    ".unfinished-search.db",
)
"""Beside the output of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """Schedules that were measured together, by content hash, and their timings."""

    key: str
    schedules: tuple[str, ...]
    timings: tuple[Timing, ...]
    digest: str = ""
    """Of the rest: a damaged line is no measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """A finished search."""

    key: str
    result: SearchResult
    digest: str
    """Of the result: a damaged one is none."""


class KeptRun:
    """The files of one output folder."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read what an earlier run left.

        Args:
            folder: of the output.
            key: of all inputs: what was kept for another key is not used.
        """
        self._folder, self._key = folder, key
        self._turns = {turn.schedules: turn.timings for turn in self._read_turns()}
        self.result = self._read_result()
        """The finished search of an interrupted run; None where there is none."""

    @property
    def num_measured(self) -> int:
        """Schedules whose timings are at hand."""
        return sum(map(len, self._turns))

    def measuring(self, measure: Measure) -> Measure:
        """The same function, answered from the file where it can be, and written to it."""

        def kept(schedules: Sequence[Schedule]) -> Sequence[Timing]:
            names = tuple(map(content_hash, schedules))
            known = self._turns.get(names)
            if known is not None:
                return known
            timings = tuple(measure(schedules))
            turn = _Turn(key=self._key, schedules=names, timings=timings)
            self._add(replace(turn, digest=content_hash(turn)))
            return timings

        return kept

    def keep_search(self, result: SearchResult, study: Path) -> None:
        """Keep a finished search and the database of its study."""
        if study.exists():
            shutil.copyfile(study, self._folder / STUDY)
        held = to_mapping(_Search(key=self._key, result=result, digest=content_hash(result)))
        write_whole(self._folder / SEARCH, json.dumps(held, separators=(",", ":")) + "\n")

    def take_study(self, study: Path) -> None:
        """Put the database of the finished search's study where a job writes it."""
        if (self._folder / STUDY).exists():
            shutil.copyfile(self._folder / STUDY, study)

    def forget(self, *, measured: bool) -> None:
        """Remove the files, those of measurements only where asked."""
        for name in (SEARCH, STUDY, *([MEASURED] if measured else [])):
            (self._folder / name).unlink(missing_ok=True)

    def _add(self, turn: _Turn) -> None:
        if not self._turns:  # what is there is of other inputs, or damaged
            (self._folder / MEASURED).unlink(missing_ok=True)
        self._turns[turn.schedules] = turn.timings
        with (self._folder / MEASURED).open("a", encoding="utf-8") as file:
            # The line break before it ends a line that was cut off.
            file.write("\n" + json.dumps(to_mapping(turn), separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_turns(self) -> list[_Turn]:
        turns: list[_Turn] = []
        for line in _text(self._folder / MEASURED).splitlines():
            try:
                turn = from_mapping(_Turn, kept_mapping(line), MEASURED)
            except SpecError:
                continue  # cut off, or damaged: it is measured again
            is_whole = turn.digest == content_hash(replace(turn, digest=""))
            if turn.key == self._key and is_whole:
                turns.append(turn)
        return turns

    def _read_result(self) -> SearchResult | None:
        try:
            held = from_mapping(_Search, kept_mapping(_text(self._folder / SEARCH)), SEARCH)
        except SpecError:
            return None
        is_whole = held.digest == content_hash(held.result)
        return held.result if held.key == self._key and is_whole else None


@contextmanager
def kept_run(folder: Path, key: str) -> Generator[KeptRun]:
    """What stays on disk when the run is killed or interrupted; measurements also when it fails."""
    kept = KeptRun(folder, key)
    try:
        yield kept
    except Exception:
        kept.forget(measured=False)
        raise
    kept.forget(measured=True)


def check_resumable(folder: Path, *, points: int, kept: KeptRun) -> None:
    """Refuse `--resume` where nothing was interrupted.

    Raises:
        ValueError: nothing is kept, or it was made from other inputs.
    """
    if points or kept.num_measured or kept.result is not None:
        return
    left = [path.name for path in folder.glob(".unfinished-*") if path.is_file()]
    why = (
        f"{', '.join(sorted(left))} is of other inputs (model, profile, seed, effort ...)"
        if left
        else "it holds no unfinished run whose search had ended"
    )
    raise ValueError(
        f"--resume needs a run that was interrupted in {folder}, but {why}; name its --output-dir "
        "and flags, or leave --resume out"
    )


def _text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except (OSError, ValueError):
        return ""
