"""Profiles on disk: CSV whose leading `# ` lines are a YAML header, so that a diff can be read.

A profile `NAME` is `NAME.csv` (kernels alone), `NAME.pairs.csv` (two side by side) and
`NAME.triples.csv` (three). Rows are appended as they are measured; a killed run resumes from the
rows that are there. A half-written last line is dropped. Of several rows of one point the last one
counts; `tidy` puts a file that is complete in order, so that two runs can be compared.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, get_args, get_type_hints

import yaml

from ..search_spaces.loader import parse_yaml
from ..search_spaces.records import SpecError, read_bounded
from ..search_spaces.schema import DTYPE_BYTES
from .contradictions import refuse_contradictions
from .energy import fit_energy, point_costs, with_fitted_joules
from .profile import JoulesSource, PairRow, Point, Profile, Row, Source, TripleRow

_POINT = tuple(f.name for f in fields(Point))
_ROW = (*_POINT, *(f.name for f in fields(Row) if f.name != "point"))
_PAIR = (
    *(f"a_{name}" for name in _POINT),
    *(f"b_{name}" for name in _POINT),
    *(f.name for f in fields(PairRow) if f.name not in ("a", "b")),
)
_TRIPLE = (
    *(f"{which}_{name}" for which in "abc" for name in _POINT),
    *(f.name for f in fields(TripleRow) if f.name not in ("a", "b", "c")),
)
_CSV_NAME = {"kind": "op", "a_kind": "a_op", "b_kind": "b_op", "c_kind": "c_op"}
PAIRS, TRIPLES = ".pairs.csv", ".triples.csv"
"""Ends of the names of files with co-runs."""
_SYNC_S = 1.0
_CELL_LIMIT = 1e15


class ProfileError(ValueError):
    """A profile file is damaged or does not fit; names file, line and remedy."""


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _row_cells(row: Row) -> list[str]:
    values = [getattr(row.point, name) for name in _POINT]
    return [_cell(value) for value in (*values, *(getattr(row, n) for n in _ROW[len(_POINT) :]))]


def _together_cells(row: PairRow | TripleRow) -> list[str]:
    is_triple = isinstance(row, TripleRow)
    points = (row.a, row.b, row.c) if is_triple else (row.a, row.b)
    values = [getattr(point, name) for point in points for name in _POINT]
    columns = (_TRIPLE if is_triple else _PAIR)[len(values) :]
    return [_cell(value) for value in (*values, *(getattr(row, name) for name in columns))]


class ProfileWriter:
    """Appends rows to one profile file, header first."""

    def __init__(self, path: Path, columns: Sequence[str], header: dict[str, str]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self._file.close()
            raise ProfileError(
                f"one run at a time appends to a profile, but another one has {path} open; wait "
                "for it"
            ) from err
        _drop_partial_line(path)
        if path.stat().st_size == 0:
            text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
            lines = [f"# {line}" for line in text.splitlines()]
            names = ",".join(_CSV_NAME.get(name, name) for name in columns)
            self._file.write("\n".join([*lines, names]) + "\n")
            self._file.flush()
        self._synced_s = 0.0

    def _write(self, cells: list[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._file.write(line.getvalue())

    @classmethod
    def solo(cls, path: Path, header: dict[str, str]) -> ProfileWriter:
        """Writer of `NAME.csv`."""
        return cls(path, _ROW, header)

    @classmethod
    def pairs(cls, path: Path, header: dict[str, str]) -> ProfileWriter:
        """Writer of `NAME.pairs.csv`."""
        return cls(path, _PAIR, header)

    @classmethod
    def triples(cls, path: Path, header: dict[str, str]) -> ProfileWriter:
        """Writer of `NAME.triples.csv`."""
        return cls(path, _TRIPLE, header)

    def append(self, row: Row | PairRow | TripleRow) -> None:
        """Hand one row to the system at once, and to the disk within a second of rows."""
        self.append_unsynced(row)
        self._file.flush()  # outlives this process; a sync takes as long as a measurement
        if time.monotonic() - self._synced_s > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def append_unsynced(self, row: Row | PairRow | TripleRow) -> None:
        """Write one row of many; closing the writer stores them."""
        self._write(_row_cells(row) if isinstance(row, Row) else _together_cells(row))

    def __enter__(self) -> ProfileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _drop_partial_line(path: Path) -> None:
    """Cut off what a killed run left of its last line, and a header without its columns."""
    held = path.read_bytes()
    size = held.rfind(b"\n") + 1
    if all(line.startswith(b"#") for line in held[:size].splitlines()):
        size = 0
    if size != len(held):
        os.truncate(path, size)


def _read(path: Path, columns: Sequence[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    try:
        text = read_bounded(path).decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ProfileError(f"cannot read the profile {path}: {err}") from err
    lines = text.split("\n")  # splitlines also breaks at form feeds and the like
    head = [line[2:] for line in lines if line.startswith("# ")]
    body = [line for line in lines if line and not line.startswith("#")]
    try:
        header = parse_yaml("\n".join(head), f"{path}, header") if head else {}
    except SpecError as err:
        raise ProfileError(f"{err}; profile again, or take another file") from err
    names = [_CSV_NAME.get(name, name) for name in columns]
    if not body or body[0].split(",") != names:
        raise ProfileError(
            f"{path} must have the columns {','.join(names)}, but its first line is "
            f"{body[0] if body else 'missing'!r}: profile again, or take another file"
        )
    records: list[dict[str, str]] = []
    for number, cells in enumerate(_cells(body[1:], path), start=2):
        if len(cells) != len(columns):
            if number == len(body) and not text.endswith("\n"):
                break
            raise ProfileError(
                f"{path}, row {number}: expected {len(columns)} cells, got {len(cells)}: delete "
                "the row, it will be measured again"
            )
        records.append(dict(zip(columns, cells, strict=True)))
    return {str(key): str(value) for key, value in header.items()}, records


def _cells(lines: list[str], path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines)
    except csv.Error as err:
        raise ProfileError(f"{path} must be CSV, but {err}: take the line out") from err


def _convert(cls: type[Any], record: dict[str, str], prefix: str, where: str) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(cls):
        name = prefix + field.name
        if name not in record:
            continue
        hint = hints[field.name]
        try:
            values[field.name] = hint(record[name]) if hint in (int, float) else record[name]
        except ValueError as err:
            raise ProfileError(f"{where}: column {name} must be {hint.__name__}: {err}") from err
        value = values[field.name]
        if hint in (int, float) and not abs(value) <= _CELL_LIMIT:  # also what is no number
            raise ProfileError(
                f"{where}: column {name} must be at most {_CELL_LIMIT:g} in size, but got "
                f"{record[name][:40]}: delete the row, it will be measured again"
            )
    return values


def read_rows(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Header and rows of `NAME.csv`.

    Raises:
        ProfileError: unreadable, wrong columns, or a cell of the wrong type.
    """
    header, records = _read(path, _ROW)
    rows: list[Row] = []
    for number, record in enumerate(records, start=2):
        where = f"{path}, row {number}"
        values = _convert(Row, record, "", where)
        _check_choice(values["source"], get_args(Source), "source", where)
        _check_choice(values["joules_source"], get_args(JoulesSource), "joules_source", where)
        row = Row(point=Point(**_convert(Point, record, "", where)), **values)
        _check_row(row, where)
        rows.append(row)
    return header, rows


def _check_row(row: Row, where: str) -> None:
    point = row.point
    if point.tokens < 1 or point.kv_len < 0 or point.num_sms < 0:
        raise ProfileError(
            f"{where}: tokens must be positive, kv_len and num_sms not negative, but got "
            f"tokens={point.tokens}, kv_len={point.kv_len}, num_sms={point.num_sms}: delete the row"
        )
    if not row.error and (row.median_us <= 0 or row.joules < 0 or row.watts < 0):
        raise ProfileError(
            f"{where}: median_us must be positive, joules and watts not negative, but got "
            f"median_us={row.median_us:g}, joules={row.joules:g}, watts={row.watts:g}: delete the "
            "row, it will be measured again"
        )
    try:
        point_costs(point)
    except (ValueError, LookupError, AttributeError, ArithmeticError) as err:
        raise ProfileError(
            f"{where}: op and shape must be as the profiler writes them, but got {point.kind!r}, "
            f"{point.shape[:80]!r} ({err}): delete the row"
        ) from err


def read_pairs(path: Path) -> tuple[dict[str, str], list[PairRow]]:
    """Header and rows of `NAME.pairs.csv`.

    Raises:
        ProfileError: unreadable, wrong columns, or a cell of the wrong type.
    """
    header, records = _read(path, _PAIR)
    pairs: list[PairRow] = []
    for number, record in enumerate(records, start=2):
        where = f"{path}, row {number}"
        a, b = (Point(**_convert(Point, record, prefix, where)) for prefix in ("a_", "b_"))
        pairs.append(PairRow(a=a, b=b, **_convert(PairRow, record, "", where)))
    return header, pairs


def read_triples(path: Path) -> tuple[dict[str, str], list[TripleRow]]:
    """Header and rows of `NAME.triples.csv`.

    Raises:
        ProfileError: unreadable, wrong columns, or a cell of the wrong type.
    """
    header, records = _read(path, _TRIPLE)
    triples: list[TripleRow] = []
    for number, record in enumerate(records, start=2):
        where = f"{path}, row {number}"
        a, b, c = (Point(**_convert(Point, record, f"{which}_", where)) for which in "abc")
        triples.append(TripleRow(a=a, b=b, c=c, **_convert(TripleRow, record, "", where)))
    return header, triples


def tidy(path: Path, more_header: Mapping[str, str] | None = None) -> None:
    """Write `NAME.csv` anew in order of its points, the last row of each; in one step.

    Args:
        path: of the file.
        more_header: entries to add to its header.
    """
    header, rows = read_rows(path)
    header |= more_header or {}
    latest = {row.point: row for row in rows}
    aside = path.with_name(f"{path.name}.part")
    aside.unlink(missing_ok=True)
    with ProfileWriter.solo(aside, header) as writer:
        for point in sorted(latest, key=lambda point: [getattr(point, name) for name in _POINT]):
            writer.append_unsynced(latest[point])
    aside.replace(path)


def _check_choice(value: str, choices: tuple[str, ...], column: str, where: str) -> None:
    if value not in choices:
        raise ProfileError(f"{where}: {column} must be one of {', '.join(choices)}, got {value!r}")


def load_profile(paths: Iterable[Path]) -> Profile:
    """One profile from several files of one GPU kind; joules that were not measured are fitted.

    Args:
        paths: `NAME.csv` files; `NAME.pairs.csv` and `NAME.triples.csv` beside each are read too.

    Raises:
        ProfileError: no file, a damaged file, or files of different GPUs or dtypes.
        ContradictoryProfileError: rows of one point of a file are far apart.
    """
    rows: dict[Point, Row] = {}
    pairs: list[PairRow] = []
    triples: list[TripleRow] = []
    headers: list[dict[str, str]] = []
    for path in paths:
        header, found = read_rows(path)
        refuse_contradictions(found, str(path))
        headers.append({**header, "file": path.name})
        rows.update({row.point: row for row in found})
        pairs_path, triples_path = path.with_suffix(PAIRS), path.with_suffix(TRIPLES)
        if pairs_path.exists():
            pairs.extend(read_pairs(pairs_path)[1])
        if triples_path.exists():
            triples.extend(read_triples(triples_path)[1])
    if not headers:
        raise ProfileError("no profile files given: pass NAME.csv files, or a folder of them")
    for key in ("hardware", "dtype"):
        if len({header.get(key) for header in headers}) != 1:
            raise ProfileError(
                f"profiles of different {key} cannot be mixed: "
                + ", ".join(f"{header['file']} has {header.get(key)}" for header in headers)
            )
    merged: dict[str, str] = {}
    for header in sorted(headers, key=lambda header: header.get("date", "")):
        merged.update(header)  # the newest file speaks; older ones add what it does not say
    if lacking := [key for key in ("hardware", "dtype") if key not in merged]:
        raise ProfileError(
            f"the header of {merged['file']} must have `{'` and `'.join(lacking)}`; add what is "
            "missing"
        )
    merged["file"] = ", ".join(header["file"] for header in headers)
    profile = Profile(
        hardware=merged["hardware"],
        dtype=merged["dtype"],
        rows=tuple(rows.values()),
        pairs=tuple(pairs),
        triples=tuple(triples),
        header=merged,
    )
    if profile.dtype not in DTYPE_BYTES:
        raise ProfileError(
            f"the header of {merged['file']}: `dtype` must be one of {', '.join(DTYPE_BYTES)}, but "
            f"got {profile.dtype[:40]!r}; correct it"
        )
    energy = fit_energy(profile, _static_w(merged))
    profile = replace(profile, energy=energy)
    return replace(profile, rows=with_fitted_joules(profile))


def _static_w(header: dict[str, str]) -> float:
    text = header.get("static_w", "117")
    try:
        watts = float(text)
    except ValueError:
        watts = -1.0
    if not 0 <= watts <= _CELL_LIMIT:
        raise ProfileError(
            f"the header of {header['file']}: `static_w` must be a number of watts, but got "
            f"{text[:40]!r}; correct it"
        )
    return watts


def profile_files(path: Path) -> list[Path]:
    """The `NAME.csv` files that a path means: itself, or all in a folder."""
    found = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    return [file for file in found if not file.name.endswith((PAIRS, TRIPLES))]


def shipped_files(hardware: str, device_name: str | None = None) -> list[Path]:
    """Shipped `NAME.csv` files of a GPU kind; only those measured on `device_name` when given."""
    folder = Path(str(files("nanoflow_tune.results").joinpath("profiles", hardware)))
    found = profile_files(folder) if folder.is_dir() else []
    if device_name is None:
        return found
    return [path for path in found if read_rows(path)[0].get("gpu") == device_name]


def shipped_profile(hardware: str) -> Profile | None:
    """The profile that came with the package, or None when this GPU has none."""
    found = shipped_files(hardware)
    return load_profile(found) if found else None
