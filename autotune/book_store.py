"""Finished points of a plan book under way, so that a killed run goes on where it stopped.

One line of JSON a point, appended when it is finished; the first line names the inputs. A line
that was cut off, and everything of other inputs, is dropped. The file is removed with the run's
success, or when it fails for a reason that another try would meet again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ..runtime.plan import Bucket
from ..search_spaces.records import SpecError, from_mapping, to_mapping
from ..search_spaces.whole_file import write_whole

FILE = ".unfinished-book.jsonl"
"""Beside the output of the job."""


class BookStore:
    """Points of one book, kept in a file."""

    def __init__(self, path: Path, key: str) -> None:
        """Read what an earlier run left.

        Args:
            path: of the file; it need not exist, its folder neither.
            key: of all inputs: points of another key are thrown away.
        """
        self._path, self._key = path, key
        self.points = self._read()
        """Finished ones, in the order they were made."""

    def add(self, bucket: Bucket) -> None:
        """Keep a finished point: its line is on disk when this returns."""
        if not self.points:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(_line({"key": self._key}), encoding="utf-8")
        self.points.append(bucket)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(to_mapping(bucket)))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[Bucket]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not whole or kept_mapping(whole[0]) != {"key": self._key}:
            return []
        points: list[Bucket] = []
        for line in whole[1:]:
            try:
                points.append(from_mapping(Bucket, kept_mapping(line), self._path.name))
            except SpecError:
                break
        if len(whole) - 1 != len(points) or not text.endswith("\n"):
            kept = "".join(whole[: len(points) + 1])
            write_whole(self._path, kept)
        return points


@contextmanager
def kept_points(path: Path, key: str) -> Generator[BookStore]:
    """A store that stays on disk when the run is killed or interrupted, and only then."""
    store = BookStore(path, key)
    try:
        yield store
    except Exception:
        store.remove()
        raise
    store.remove()


def _line(mapping: dict[str, Any]) -> str:
    return json.dumps(mapping, separators=(",", ":")) + "\n"


def kept_mapping(text: str) -> dict[str, Any]:
    """A JSON object that an earlier run wrote; empty where it is damaged or something else."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
