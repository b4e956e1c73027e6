"""What an interrupted run leaves, damaged: it is used or measured again, and never ends a run."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import empty_folder
from hypothesis import given
from mutations import damaged_bytes, damaged_document, tries

from nanoflow_tune.autotune import book_store, resume
from nanoflow_tune.autotune.book_store import BookStore
from nanoflow_tune.autotune.certificate import SpaceBound
from nanoflow_tune.autotune.milp import Certificate
from nanoflow_tune.autotune.resume import KeptRun
from nanoflow_tune.autotune.search import SearchResult
from nanoflow_tune.runtime.plan import Bucket, Timing
from nanoflow_tune.runtime.plan_io import load_plan

PLAN = Path(__file__).parents[2] / "results" / "reports" / "llama3-8b-h200-tp1" / "plan.yaml"
BUCKET = load_plan(PLAN).buckets[0]
SCHEDULES = (BUCKET.sequential.schedule, BUCKET.best_overlapped.schedule)


def found():
    """A search as it is kept, made of a shipped plan's schedules."""
    return SearchResult(
        winner=BUCKET.winner,
        sequential=BUCKET.sequential,
        best_overlapped=BUCKET.best_overlapped,
        race=(BUCKET.sequential, BUCKET.best_overlapped),
        certificate=Certificate(
            status="limit", period_us=2.0, bound_us=1.0, gap=0.5, seconds=1.0, num_binaries=3,
            solver="HiGHS",
        ),
        space_bound=SpaceBound(
            bound_us=1.0, best_us=2.0, binds="compute", counts=(), num_cuts=1, num_full=1,
            seconds=0.1,
        ),
        lower_bound_us=1.0,
        power_limit_us=1.5,
        bound="power",
        history=((0, "sequential", 2.0),),
        stages=("one",),
        seed=0,
    )  # fmt: skip


def files():
    """Valid contents of the three files, by name."""
    with empty_folder() as folder:
        kept = KeptRun(folder, "key")
        kept.keep_search(found(), folder / "none.db")
        times = [Timing(period_us=1e4, source="measured") for _ in SCHEDULES]
        kept.measuring(lambda _: times)(SCHEDULES)
        BookStore(folder / book_store.FILE, "key").add(BUCKET)
        names = (resume.SEARCH, resume.MEASURED, book_store.FILE)
        return {name: (folder / name).read_bytes() for name in names}


FILES = files()


def test_the_undamaged_files_are_taken_over():
    with empty_folder() as folder:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        kept = KeptRun(folder, "key")
        assert kept.result == found()
        assert kept.num_measured == len(SCHEDULES)
        assert BookStore(folder / book_store.FILE, "key").points == [BUCKET]


@tries(60, 3000)
@given(
    damaged_bytes(FILES[resume.SEARCH]) | damaged_document(json.loads(FILES[resume.SEARCH])),
    damaged_bytes(FILES[resume.MEASURED])
    | damaged_document(json.loads(FILES[resume.MEASURED])).map(lambda held: held + b"\n"),
    damaged_bytes(FILES[book_store.FILE]),
)
def test_damaged_ones_are_used_or_dropped(search, measured, points):
    with empty_folder() as folder:
        (folder / resume.SEARCH).write_bytes(search)
        (folder / resume.MEASURED).write_bytes(measured)
        (folder / book_store.FILE).write_bytes(points)
        kept = KeptRun(folder, "key")
        assert kept.result is None or kept.result == found()
        times = [Timing(period_us=1e4, source="measured") for _ in SCHEDULES]
        assert list(kept.measuring(lambda _: times)(SCHEDULES)) == times
        store = BookStore(folder / book_store.FILE, "key")
        assert all(isinstance(point, Bucket) for point in store.points)
        count = len(store.points)
        store.add(BUCKET)
        assert len(BookStore(folder / book_store.FILE, "key").points) == count + 1
