from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.runtime.admission import steady_rows
from nanoflow_tune.runtime.page_pool import PagePool
from nanoflow_tune.runtime.prefix_index import PrefixIndex
from nanoflow_tune.runtime.scheduler import Scheduler
from nanoflow_tune.runtime.scheduler_records import SchedulerLimits
from nanoflow_tune.runtime.sequence import (
    FinishEvent,
    GenerationRequest,
    RequestRejected,
    SamplingParams,
    TokenEvent,
)
from nanoflow_tune.runtime.step import NOT_YET_KNOWN

EOS = 7
PAGE = 4


class FakeDevice:
    """What the cache would hold: for each page and place, which token of which text is there.

    Tokens are made from the text before them, so that a wrong page or a lost key shows.
    """

    def __init__(self, limits):
        self.cells = {}
        self.tables = [{} for _ in range(limits.max_running)]
        self.last = [None] * limits.max_running
        self.store = {}

    def move(self, cache_ops):
        for op in cache_ops:
            if op.kind == "save":
                assert op.key not in self.store
                self.store[op.key] = [dict(self.cells.get(page, {})) for page in op.pages]
            elif op.kind == "load":
                for page, saved in zip(op.pages, self.store[op.key], strict=False):
                    self.cells[page] = dict(saved)
            elif op.kind == "drop":
                del self.store[op.key]

    def run(self, step):
        inputs = step.inputs
        self.move(inputs.cache_ops)
        for taken in inputs.slots_taken:
            self.tables[taken.slot] = {}
        for slot, place, page in inputs.page_updates_U3.tolist():
            self.tables[slot][place] = page
        owners = {}
        tokens = []
        rows = zip(
            inputs.decode_slots_R.tolist(),
            inputs.decode_positions_R.tolist(),
            inputs.decode_tokens_R.tolist(),
            strict=True,
        )
        for slot, position, token in rows:
            token = self.last[slot] if token == NOT_YET_KNOWN else token
            self.write(slot, position, token)
            tokens.append((slot, self.sample(slot, position, owners)))
        for chunk in inputs.chunks:
            for offset, token in enumerate(chunk.token_ids):
                self.write(chunk.slot, chunk.first_position + offset, token)
            end = chunk.first_position + len(chunk.token_ids) - 1
            sampled = self.sample(chunk.slot, end, owners)
            if chunk.is_complete:
                tokens.append((chunk.slot, sampled))
        for slot, token in tokens:
            self.last[slot] = token
        assert [slot for slot, _ in tokens] == list(inputs.logit_slots)
        return [token for _, token in tokens]

    def write(self, slot, position, token):
        page = self.tables[slot][position // PAGE]
        self.cells.setdefault(page, {})[position % PAGE] = token

    def sample(self, slot, position, owners):
        text = []
        for place in range(position + 1):
            page = self.tables[slot][place // PAGE]
            assert page != 0
            assert owners.setdefault(page, slot) == slot, "a page has two owners"
            text.append(self.cells[page][place % PAGE])
        return next_token(text)


def next_token(text):
    return random.Random(repr(text)).randrange(12)


def expected_tokens(request):
    text = list(request.prompt_token_ids)
    while True:
        text.append(next_token(text))
        generated = len(text) - len(request.prompt_token_ids)
        if (text[-1] == EOS and not request.sampling.ignore_eos) or (
            generated == request.sampling.max_tokens
        ):
            return text[len(request.prompt_token_ids) :]


class Harness:
    """Drives the scheduler as the engine does: a step is formed before the last one is known."""

    def __init__(self, num_pages=24, host_pages=0, disk_pages=0, **limits):
        self.limits = SchedulerLimits(
            **({"max_model_len": 64, "max_running": 6, "expected_decode_tokens": 3.0} | limits)
        )
        self.pool = PagePool(num_pages, PAGE)
        index = PrefixIndex(host_pages, disk_pages, PAGE)
        self.scheduler = Scheduler(self.limits, self.pool, frozenset({EOS}), index)
        self.device = FakeDevice(self.limits)
        self.events = {}
        self.steps = []
        self.in_flight = None

    def add(self, request):
        self.scheduler.check(request)
        self.events[request.request_id] = []
        self.scheduler.add(request, self.events[request.request_id].append)

    def step(self, max_rows=8):
        formed = self.scheduler.schedule(max_rows)
        if formed is not None:
            self.steps.append(formed)
            assert 0 < formed.num_rows <= max_rows
        done, self.in_flight = self.in_flight, None
        if formed is not None:
            self.in_flight = formed, self.device.run(formed)
        if done is not None:
            self.scheduler.update(*done, None)

    def drain(self, max_rows=8):
        for _ in range(5000):
            if not self.scheduler.has_work and self.in_flight is None:
                return
            self.step(max_rows)
        raise AssertionError("the scheduler does not get on")

    def tokens(self, request_id):
        return [e.token_id for e in self.events[request_id] if isinstance(e, TokenEvent)]

    def ends(self, request_id):
        return [e for e in self.events[request_id] if isinstance(e, FinishEvent)]


def request(name, prompt_length, max_tokens, *, seed=0, prompt=None, **sampling):
    rng = random.Random(f"{seed}/{name}")
    tokens = prompt or tuple(rng.randrange(12) for _ in range(prompt_length))
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0, **sampling),
    )


requests_st = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 30),  # max_tokens
        st.booleans(),  # ignore_eos
        st.integers(0, 40),  # arrives before this step
        st.one_of(st.none(), st.integers(0, 60)),  # cancelled before this step
    ),
    min_size=1,
    max_size=14,
)


@given(
    requests_st,
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 9),
    st.sampled_from([2, 128]),  # tiles of 2 rows: prompts come in at a pace
)
@settings(max_examples=200, deadline=None)
def test_no_request_is_lost_or_altered_and_no_page_leaks(
    wishes, host_pages, disk_pages, max_rows, tile_rows
):
    harness = Harness(
        num_pages=16, host_pages=host_pages, disk_pages=disk_pages, tile_rows=tile_rows
    )
    requests = {
        f"r{index}": request(f"r{index}", prompt, tokens, ignore_eos=ignore)
        for index, (prompt, tokens, ignore, _, _) in enumerate(wishes)
    }
    cancelled = {f"r{index}": wish[4] for index, wish in enumerate(wishes)}
    arrivals = sorted(range(len(wishes)), key=lambda index: wishes[index][3])
    for time in range(61):
        while arrivals and wishes[arrivals[0]][3] <= time:
            harness.add(requests[f"r{arrivals.pop(0)}"])
        for name, when in cancelled.items():
            if when == time and name in harness.events:
                harness.scheduler.cancel(name)
        harness.step(max_rows)
    harness.drain(max_rows)
    for name, wanted in requests.items():
        (end,) = harness.ends(name)
        assert harness.events[name][-1] is end
        expected, tokens = expected_tokens(wanted), harness.tokens(name)
        assert end.num_generated_tokens == len(tokens)
        if end.reason == "cancelled":
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            assert end.reason == (
                "stop" if tokens[-1] == EOS and not wanted.sampling.ignore_eos else "length"
            )
    assert harness.pool.num_used == 0
    harness.device.move(
        harness.scheduler._residency.ops
    )  # of the last ends, no step came after them
    assert len(harness.device.store) == len(harness.scheduler._index._entries)


def test_the_dense_batch_stays_full_while_work_is_abundant():
    harness = Harness(num_pages=1000, max_running=32)
    for index in range(60):
        harness.add(request(f"r{index}", 13, 9, ignore_eos=True))
    while harness.scheduler.waiting:
        harness.step(16)
    full = [step.num_rows for step in harness.steps if step is not harness.steps[-1]]
    assert set(full) == {16}
    harness.drain(16)


def test_decodes_come_first_and_prompts_in_order_of_arrival():
    harness = Harness(num_pages=1000)
    for index in range(6):
        harness.add(request(f"r{index}", 10, 6, ignore_eos=True))
    harness.drain(12)
    firsts = {}
    for number, step in enumerate(harness.steps):
        for sequence, _ in step.chunks:
            firsts.setdefault(sequence.order, number)
        able = [s for s in step.decodes if s.order < 6]
        assert [s.order for s in able] == sorted(s.order for s in able)
    assert list(firsts) == sorted(firsts)
    assert all(a <= b for a, b in pairwise(firsts.values()))


def test_the_latest_arrival_is_preempted_and_comes_back_without_recompute():
    harness = Harness(num_pages=8, admitted_fraction=10.0)  # admits what will not fit
    for index in range(3):
        harness.add(request(f"r{index}", 8, 14, ignore_eos=True))
    harness.drain(30)
    assert harness.scheduler.totals.preemptions > 0
    saved = [op for step in harness.steps for op in step.inputs.cache_ops if op.kind == "save"]
    assert len(saved) == harness.scheduler.totals.preemptions
    rows = sum(step.num_rows for step in harness.steps)
    assert rows <= 3 * (8 + 13)  # nothing is computed twice
    first = next(step for step in harness.steps if step.inputs.cache_ops)
    assert 0 in [sequence.order for sequence in first.decodes]


def test_without_swap_space_the_request_ends_with_an_error():
    harness = Harness(num_pages=8, admitted_fraction=10.0, max_swapped_pages=0)
    for index in range(3):
        harness.add(request(f"r{index}", 8, 14, ignore_eos=True))
    harness.drain(30)
    reasons = [harness.ends(f"r{index}")[0].reason for index in range(3)]
    assert reasons[0] == "length"
    assert "error" in reasons
    assert harness.pool.num_used == 0


def test_admission_waits_for_the_predicted_peak():
    careful = Harness(num_pages=20, expected_decode_tokens=20.0)
    for index in range(4):
        careful.add(request(f"r{index}", 8, 20, ignore_eos=True))
    careful.drain(40)
    assert careful.scheduler.totals.preemptions == 0
    assert max(len(step.decodes) for step in careful.steps[:9]) == 2


def test_a_second_round_takes_its_pages_from_the_store():
    harness = Harness(num_pages=40, host_pages=40)
    first = request("a", 13, 8, ignore_eos=True)
    harness.add(first)
    harness.drain()
    text = (*first.prompt_token_ids, *harness.tokens("a"))
    second = request("b", 0, 6, prompt=(*text, 1, 2), ignore_eos=True)
    harness.add(second)
    harness.drain()
    assert harness.scheduler.totals.prefix == 20  # of 13 + 8 tokens, the last without its key
    assert harness.tokens("b") == expected_tokens(second)


def test_requests_that_can_never_run_are_refused():
    harness = Harness(num_pages=8, max_waiting=1)
    with pytest.raises(RequestRejected, match="at least one token") as empty:
        harness.add(request("a", 0, 1))
    assert empty.value.status == 400
    with pytest.raises(RequestRejected, match="64 tokens") as long:
        harness.add(request("a", 60, 10))
    assert long.value.status == 413
    with pytest.raises(RequestRejected, match="holds 32 tokens") as large:
        harness.add(request("a", 20, 20))
    assert large.value.status == 413
    harness.add(request("a", 2, 2))
    with pytest.raises(RequestRejected, match="1 requests are waiting") as full:
        harness.add(request("b", 2, 2))
    assert (full.value.status, full.value.retry_after_s) == (429, 1.0)


def paced(num_requests, num_pages, prompt=16, answer=16):
    harness = Harness(
        num_pages=num_pages, max_running=64, expected_decode_tokens=float(answer), tile_rows=4
    )
    for index in range(num_requests):
        harness.add(request(f"r{index}", prompt, answer, ignore_eos=True))
    while harness.scheduler.waiting:
        harness.step(64)
    return harness


def test_more_than_the_cache_has_room_for_comes_in_at_the_pace_of_ends_in_whole_tiles():
    pages = 70
    decodes, prompts = steady_rows(16.0, 16.0, 0.98 * pages, PAGE)
    assert decodes + prompts < 64
    harness = paced(100, pages)
    held = harness.steps[:-20]  # before those that are left find room
    counts = [sum(len(chunk.token_ids) for _, chunk in step.chunks) for step in held]
    assert max(counts) <= prompts + 4
    rows = [step.num_rows for step in held if step.chunks]
    assert sum(count % 4 == 0 for count in rows) > 0.8 * len(rows)
    late = [len(step.decodes) for step in held[30:]]
    assert min(late) > 0.5 * decodes  # of all ages: nothing ends all at once
    assert harness.scheduler.totals.preemptions == 0


def test_what_finds_room_at_once_is_not_held_back():
    harness = paced(6, 70)
    assert harness.steps[0].num_rows == 64
    roomy = paced(100, 2000)
    assert roomy.steps[0].num_rows == 64  # the cache keeps a full dense batch busy
