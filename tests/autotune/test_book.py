"""A plan book on costs written down by hand: the size from which overlap pays is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.autotune import book as book_module
from nanoflow_tune.autotune import regret as regret_module
from nanoflow_tune.autotune.baselines import equal_split
from nanoflow_tune.autotune.book import build_book, make_bucket
from nanoflow_tune.autotune.book_grid import BookGrid, Traffic, check_sizes, grid_points
from nanoflow_tune.autotune.book_page import book_section, book_values
from nanoflow_tune.autotune.book_store import BookStore, kept_points
from nanoflow_tune.autotune.break_even import find_break_even, sentence
from nanoflow_tune.autotune.cost_model import CostModel, Estimate
from nanoflow_tune.autotune.point_search import PointSearch
from nanoflow_tune.autotune.race import PREDICTED_MARGIN
from nanoflow_tune.autotune.resize import resized
from nanoflow_tune.autotune.simulator import SYNC_US
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import RowMix
from nanoflow_tune.runtime.plan import BreakEven, Plan
from nanoflow_tune.runtime.plan_io import dump_plan, load_plan
from nanoflow_tune.runtime.schedule import IllegalScheduleError
from nanoflow_tune.search_spaces.schema import WorkloadSpec

from .fakes import graph_of, h200, linear_profile, quick_space
from .tiny import FixedCosts, tiny_graph

LAYERS = 12
GRAPH = tiny_graph(LAYERS)
SPACE = quick_space(token_granularity=128)
DECODES = WorkloadSpec(name="decodes", prompt_tokens=1, decode_tokens=1023)
"""All rows of a steady batch decode, to the granularity of decode rows."""
TRAFFIC = Traffic(model=GRAPH.model, hardware=h200(), workload=DECODES, num_gpus=1)
GRID = BookGrid(tokens=(256, 512, 1024, 2048), contexts=(), mixes=("steady",), regret_samples=0)
WHOLE_US, US_PER_ROW = 10.0, 0.02


@dataclass
class LinearCosts(FixedCosts):
    """Each op takes a fixed time, longer on a part of the SMs, and so much for each row."""

    part_us: float = WHOLE_US
    dtype: str = "bfloat16"
    power: None = None

    def estimate(self, op, mix, num_sms, variant):
        rows = op.rows(mix)
        fixed = WHOLE_US if num_sms == self.hardware.num_sms else self.part_us
        return Estimate(fixed + US_PER_ROW * rows if rows else 0.0, 0.0, "measured")

    def variants(self, op, num_sms):
        return ("any",) if num_sms else ()


def search_of(part_us: float) -> PointSearch:
    costs = LinearCosts(us={}, part_us=part_us)
    return PointSearch(graph=GRAPH, cost_model=costs, space=SPACE)  # pyright: ignore


def plan_of(search: PointSearch, tokens: int) -> Plan:
    rows = TRAFFIC.rows(tokens, 1.0, DECODES.decode_context_tokens)
    main = make_bucket(rows, search, search.solve(rows, (), ()))
    return Plan(
        model="tiny",
        hardware="h200",
        workload="decodes",
        num_gpus=1,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_size=16,
        buckets=(main,),
    )


def sequential_us(tokens: int) -> float:
    return LAYERS * 2 * (WHOLE_US + US_PER_ROW * tokens)


def overlapped_us(tokens: int, part_us: float) -> float:
    """Two halves in turn: in each half period one computes while the other one attends.

    Halves are multiples of 128 rows where that can be, so that the larger one sets the pace.
    """
    first = round(tokens / 2 / 128) * 128 if tokens >= 256 else tokens // 2
    half_us = part_us + SYNC_US + US_PER_ROW * max(first, tokens - first)
    return LAYERS * 2 * half_us + half_us - SYNC_US  # the first nano-op waits for nobody


def oracle(part_us: float) -> int:
    """The smallest multiple of 128 at which overlap wins by more than the margin."""
    sizes = range(128, 4097, 128)
    return next(
        n for n in sizes if overlapped_us(n, part_us) < (1 - PREDICTED_MARGIN) * sequential_us(n)
    )


@pytest.mark.parametrize("tokens", [256, 1024])
def test_the_oracle_is_what_the_simulator_says(tokens):
    rows = TRAFFIC.rows(tokens, 1.0, 100)
    found = search_of(20.0).solve(rows, (), ())
    assert found.sequential.predicted.period_us == pytest.approx(sequential_us(tokens))
    best_us = found.best_overlapped.predicted.period_us
    assert best_us == pytest.approx(overlapped_us(tokens, 20.0), rel=2e-3)


@pytest.mark.parametrize("part_us", [13.0, 15.0, 18.0, 21.0])
def test_the_break_even_is_found_between_the_grid_points(part_us):
    expected = oracle(part_us)
    assert 256 < expected < 2048
    book = build_book(plan_of(search_of(part_us), 512), search_of(part_us), TRAFFIC, GRID, seed=0)
    (even,) = book.break_even
    assert even.tokens == expected
    assert even.wins_at == tuple(n for n in GRID.tokens if n >= expected)
    assert (even.smallest_tokens, even.largest_tokens) == (256, 2048)
    assert f"from {expected} tokens up" in sentence(even)


def test_overlap_that_never_or_always_pays_is_said_to():
    never = build_book(plan_of(search_of(90.0), 512), search_of(90.0), TRAFFIC, GRID, seed=0)
    assert never.break_even[0].tokens is None
    assert "never pays on this card" in sentence(never.break_even[0])
    assert "from 256 to 2048 tokens" in sentence(never.break_even[0])
    always = build_book(plan_of(search_of(5.0), 512), search_of(5.0), TRAFFIC, GRID, seed=0)
    assert always.break_even[0].tokens == 256
    assert "at every size looked at" in sentence(always.break_even[0])


def test_sizes_where_overlap_pays_are_named_while_they_are_few():
    few = BreakEven(
        mix="steady",
        decode_context_tokens=768.0,
        smallest_tokens=128,
        largest_tokens=4096,
        tokens=None,
        wins_at=(128, 256),
    )
    assert "at 128, 256 tokens, but not at the largest size looked at, 4096" in sentence(few)
    many = replace(few, wins_at=(128, 256, 512, 1024))
    assert "at 4 of the sizes from 128 to 1024 tokens, but not" in sentence(many)
    last = replace(few, tokens=4096, wins_at=(4096,))
    assert sentence(last).endswith("at 4096 tokens, the largest size looked at")


@pytest.mark.parametrize(("gain", "is_said"), [(1.1, True), (1.0, False)])
def test_a_book_says_where_the_measured_batch_was_predicted_otherwise(gain, is_said):
    search = search_of(90.0)
    book = build_book(plan_of(search, 512), search, TRAFFIC, GRID, seed=0)
    main = book.buckets[0]

    def measured(candidate, factor):
        timing = replace(candidate.predicted, source="measured")
        return replace(candidate, measured=replace(timing, period_us=timing.period_us / factor))

    sequential, overlapped = measured(main.sequential, 1.0), measured(main.best_overlapped, gain)
    main = replace(main, sequential=sequential, best_overlapped=overlapped, winner=sequential)
    text = book_values(replace(book, buckets=(main, *book.buckets[1:])))["sentence"]
    assert "own batch is measured, the others are predicted" in text
    ratio = sequential.predicted.period_us / overlapped.predicted.period_us
    assert (f"{ratio * gain:.3f}x there, {ratio:.3f}x was predicted" in text) == is_said


def test_a_win_that_does_not_last_to_the_largest_size_is_no_break_even():
    search = search_of(5.0)
    rows = [TRAFFIC.rows(tokens, 1.0, 100) for tokens in (256, 512, 1024)]
    buckets = [make_bucket(row, search, search.solve(row, (), ())) for row in rows]
    last = replace(buckets[2], winner=buckets[2].sequential)

    def ask(tokens: int) -> bool:
        raise AssertionError(f"{tokens} was not to be asked")

    even = find_break_even([last, buckets[0], buckets[1]], 128, ask)
    assert (even.tokens, even.wins_at) == (None, (256, 512))
    assert "at 256, 512 tokens, but not" in sentence(even)


def test_every_point_of_a_book_may_run_and_the_main_one_is_first(tmp_path):
    graph = graph_of("llama3-8b")
    costs = CostModel(linear_profile(), h200())
    search = PointSearch(graph=graph, cost_model=costs, space=SPACE)
    workload = WorkloadSpec(name="512/512", prompt_tokens=512, decode_tokens=512)
    traffic = Traffic(model=graph.model, hardware=h200(), workload=workload, num_gpus=1)
    grid = BookGrid(tokens=(128, 512, 4096), contexts=(2048.0,), regret_samples=2)
    rows = traffic.rows(1024, 0.5, 768)
    plan = replace(plan_of(search_of(10.0), 256), model="llama3-8b")
    main = make_bucket(rows, search, search.solve(rows, (), ()))
    book = build_book(replace(plan, buckets=(main,)), search, traffic, grid, seed=0)
    assert replace(book.buckets[0], overlap_gain=None) == main
    found = [(b.mix, b.dense_batch_tokens, b.decode_tokens) for b in book.buckets[1:]]
    assert found[:2] == [("steady", 512, 256), ("steady", 128, 64)]  # 4096 does not fit
    assert ("prefill_heavy", 4096, 512) in found
    assert {(p.mix, round(p.rows.tokens)) for p in book.left_out} >= {
        ("steady", 4096),
        ("decode_only", 4096),
    }
    assert not any(traffic.fits(point.rows) for point in book.left_out)
    written = replace(plan, buckets=book.buckets, break_even=book.break_even)
    dump_plan(written, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", graph, h200()) == written
    assert (tmp_path / "plan.yaml").stat().st_size < 400_000
    for bucket in book.buckets:
        assert bucket.winner in (bucket.sequential, bucket.best_overlapped)
        assert bucket.best_overlapped.schedule.is_overlapped
    regret = book.regret
    assert regret is not None
    assert 0 <= regret.median_percent <= regret.worst.percent
    assert 0 <= regret.median_choice_percent <= regret.worst_choice_percent
    assert regret.worst_choice_percent <= regret.worst.percent + 1e-9
    page = book_section(book_values(book), lambda heads, rows: f"{list(heads)}{list(rows)}")
    assert "Plan book" in page
    assert "never" in page
    assert "median" in page


def test_the_regret_of_a_batch_between_points_is_that_of_the_plan_the_engine_takes(monkeypatch):
    search = search_of(20.0)
    grid = replace(GRID, tokens=(256, 2048), regret_samples=2)
    sizes = (1024, 1536, 2048)
    batches = [TRAFFIC.rows(tokens, 1.0, DECODES.decode_context_tokens) for tokens in sizes]
    monkeypatch.setattr(regret_module, "_batches", lambda *_: iter(batches))
    regret = build_book(plan_of(search, 256), search, TRAFFIC, grid, seed=0).regret
    assert regret is not None
    between, shortened, at_point = regret.samples
    assert (between.chosen, between.chosen_tokens) == ("sequential", 1024)  # which wins there
    assert (shortened.chosen, shortened.chosen_tokens) == ("overlapped", 1536)
    assert [r.percent for r in (between, shortened)] == pytest.approx([0.0, 0.0], abs=0.2)
    assert (at_point.chosen, at_point.chosen_tokens) == ("overlapped", 2048)
    assert at_point.percent == pytest.approx(0.0, abs=0.2)


def test_a_book_is_the_same_for_a_seed():
    def make():
        grid = replace(GRID, regret_samples=3)
        return build_book(plan_of(search_of(20.0), 512), search_of(20.0), TRAFFIC, grid, seed=3)

    assert make() == make()


def test_a_killed_run_keeps_its_points_and_ends_like_one_that_was_not(tmp_path, monkeypatch):
    search, path = search_of(22.0), tmp_path / "folder" / "points.jsonl"
    whole = build_book(plan_of(search, 512), search, TRAFFIC, GRID, seed=0)
    solve, solved = book_module.solved, list[float]()

    def killed_at_third(search, rows, buckets):
        solved.append(rows.tokens)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return solve(search, rows, buckets)

    monkeypatch.setattr(book_module, "solved", killed_at_third)
    with pytest.raises(KeyboardInterrupt), kept_points(path, "key") as store:
        build_book(plan_of(search, 512), search, TRAFFIC, GRID, seed=0, store=store)
    assert solved == [2048, 1024, 256]
    assert len(BookStore(path, "key").points) == 2
    solved += [0.0]  # beyond the third
    said = list[str]()
    with kept_points(path, "key") as store:
        again = build_book(
            plan_of(search, 512),
            search,
            TRAFFIC,
            GRID,
            seed=0,
            store=store,
            on_progress=said.append,
        )
    assert again == whole
    assert 256 in solved[4:]
    assert not {1024.0, 2048.0} & set(solved[4:])
    assert "2 points are taken over from an interrupted run" in said
    assert not path.exists()


def test_points_of_other_inputs_and_torn_lines_are_dropped(tmp_path):
    path, bucket = tmp_path / "points.jsonl", plan_of(search_of(10.0), 256).buckets[0]
    store = BookStore(path, "key")
    store.add(bucket)
    store.add(bucket)
    assert BookStore(path, "key").points == [bucket, bucket]
    assert BookStore(path, "other").points == []
    whole = path.read_text()
    path.write_text(whole[:-20])
    torn = BookStore(path, "key")
    assert torn.points == [bucket]
    torn.add(bucket)
    assert path.read_text() == whole
    path.write_bytes(b"\xff\xfe")
    assert BookStore(path, "key").points == []


def test_points_of_a_run_that_fails_are_forgotten(tmp_path):
    path, bucket = tmp_path / "points.jsonl", plan_of(search_of(10.0), 256).buckets[0]

    def fail() -> None:
        with kept_points(path, "key") as store:
            store.add(bucket)
            assert path.exists()
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        fail()
    assert not path.exists()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(32, 512).map(lambda n: 8 * n),
    part=st.floats(0, 1),
    step=st.sampled_from([16, 128]),
    shift=st.sampled_from([-128, 0, 128]),
    order=st.sampled_from(["decodes_first", "interleaved"]),
)
def test_a_structure_on_other_rows_holds_them_all_and_may_run(tokens, part, step, shift, order):
    graph, costs = graph_of("llama3-8b"), COSTS
    decodes = round(part * tokens)
    rows = RowMix(
        decode_tokens=decodes,
        prefill_tokens=tokens - decodes,
        decode_context_tokens=900,
        prefill_context_tokens=300,
    )
    fixed = {"order": order, "step": step, "shift": shift, "shares": {"compute": 84, "memory": 48}}
    if not 0 < round(tokens / 2 / step) * step + shift < tokens:
        with pytest.raises(IllegalScheduleError, match="too few"):
            resized(STRUCTURE, rows, graph, costs, **fixed)
        return
    found = resized(STRUCTURE, rows, graph, costs, **fixed)
    check(found, graph, 132, 8)
    assert found.dense_batch_tokens == tokens
    assert sum(batch.decode_tokens for batch in found.nano_batches) == decodes
    assert [n.op for n in found.nano_ops] == [n.op for n in STRUCTURE.nano_ops]
    assert {n.num_sms for n in found.nano_ops} <= {84, 48, 132}


COSTS = CostModel(linear_profile(), h200())
STRUCTURE = equal_split(
    graph_of("llama3-8b"),
    COSTS,
    RowMix(
        decode_tokens=1024,
        prefill_tokens=1024,
        decode_context_tokens=768,
        prefill_context_tokens=256.5,
    ),
    SPACE,
)


def test_the_grid_scales_prompts_with_the_kv_length_and_names_equal_points_once():
    workload = WorkloadSpec(name="512/512", prompt_tokens=512, decode_tokens=512)
    traffic = Traffic(model=GRAPH.model, hardware=h200(), workload=workload, num_gpus=1)
    assert traffic.contexts(replace(GRID, contexts=(768.0, 1536.0))) == (768.0, 1536.0)
    rows = traffic.rows(1024, 0.5, 1536)
    assert (rows.decode_tokens, rows.prefill_tokens) == (512, 512)
    assert rows.prefill_context_tokens == (1024 + 1) / 2
    grid = replace(GRID, contexts=(768.0,), mixes=("steady", "decode_only", "prefill_heavy"))
    kept, _ = grid_points(grid, traffic, main_tokens=1024)
    assert len({point.key for point in kept}) == len(kept) == 11
    assert not [point for point in kept if point.key == (1024, 512, 768)]


@pytest.mark.parametrize("sizes", [(12,), (8,), (512, 515), (-128,)])
def test_sizes_that_make_no_nano_batches_are_refused(sizes):
    with pytest.raises(ValueError, match="--buckets must be multiples of 8 from 16 up"):
        check_sizes(sizes)
