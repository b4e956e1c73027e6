from __future__ import annotations

import random
import threading

import pytest
from engine_builders import (
    CPU,
    EOS,
    MODEL,
    Collector,
    book_of,
    generate_alone,
    make_engine,
    make_request,
    serve_on_rank,
)

from nanoflow_tune.runtime.engine_config import LatencyTarget
from nanoflow_tune.runtime.launch import RankGroup
from nanoflow_tune.runtime.sequence import RequestRejected
from nanoflow_tune.runtime.weights import random_weights


@pytest.fixture(scope="module")
def weights():
    return random_weights(MODEL, device=CPU)


def mixed_requests(count, seed=0):
    rng = random.Random(seed)
    return [
        make_request(
            f"r{index}",
            rng.choice([1, 3, 20, 60, 90]),
            rng.choice([1, 2, 10, 30]),
            ignore_eos=rng.random() < 0.3,
        )
        for index in range(count)
    ]


def run_all(engine, requests):
    collector = Collector()
    engine.start()
    try:
        for request in requests:
            engine.submit(request, collector.on_event)
        collector.wait([request.request_id for request in requests])
    finally:
        engine.close()
    return collector


@pytest.mark.parametrize("num_pages", [200, 24])
def test_fifty_mixed_requests_generate_what_each_generates_alone(weights, num_pages):
    engine = make_engine(weights=weights, num_pages=num_pages, admitted_fraction=3.0)
    requests = mixed_requests(50)
    collector = run_all(engine, requests)
    for request in requests:
        expected = generate_alone(weights, request)
        assert collector.tokens(request.request_id) == expected
        (end,) = collector.ends(request.request_id)
        is_stop = expected[-1] == EOS and not request.sampling.ignore_eos
        assert end.reason == ("stop" if is_stop else "length")
        assert end.num_generated_tokens == len(expected)
    stats = engine.stats
    assert stats.requests_finished_total == 50
    assert (stats.kv_pages_used, stats.running, stats.waiting, stats.swapped) == (0, 0, 0, 0)
    assert (stats.preemptions_total > 0) == (num_pages == 24)


def test_sequential_and_overlapped_plans_generate_the_same(weights):
    requests = mixed_requests(20, seed=1)
    planned = run_all(make_engine(weights=weights), requests)
    plain = run_all(make_engine(book_of(remark="close but different"), weights), requests)
    for request in requests:
        assert planned.tokens(request.request_id) == plain.tokens(request.request_id)


def test_the_plan_runs_full_steps_and_sequential_schedules_small_ones(weights):
    labels = []
    engine = make_engine(weights=weights)
    launch = engine._launch

    def recording(*args, **kwargs):
        launched = launch(*args, **kwargs)
        labels.append((engine.stats.bucket_tokens, engine.stats.plan_in_use))
        return launched

    engine._launch = recording
    run_all(engine, [make_request(f"r{i}", 20, 30, ignore_eos=True) for i in range(40)])
    full = [label for rows, label in labels if rows == 64]
    assert any(label.startswith("overlapped (") and "faster" in label for label in full)
    small = [label for rows, label in labels if rows < 64]
    assert all(label.startswith("sequential (no overlapped schedule") for label in small)


def test_cancelled_requests_end_and_their_pages_come_back(weights):
    engine, collector = make_engine(weights=weights), Collector()
    engine.start()
    requests = [make_request(f"r{i}", 10, 100, ignore_eos=True) for i in range(4)]
    for request in requests:
        engine.submit(request, collector.on_event)
    collector.wait_tokens("r1", 3)
    engine.cancel("r1")
    engine.cancel("r1")
    engine.cancel("nobody")
    collector.wait([request.request_id for request in requests])
    engine.close()
    assert collector.ends("r1")[0].reason == "cancelled"
    assert (
        collector.tokens("r1")
        == generate_alone(weights, requests[1])[: len(collector.tokens("r1"))]
    )
    assert [len(collector.tokens(f"r{i}")) for i in (0, 2, 3)] == [100] * 3
    assert engine.stats.kv_pages_used == 0


def test_a_second_round_loads_its_pages_and_generates_the_same(weights):
    for host, disk in ((50, 0), (6, 50)):
        engine = make_engine(
            weights=weights, offload_host_pages=host, offload_disk_pages=disk, page_bytes=4096
        )
        collector = Collector()
        engine.start()
        first = make_request("first", 60, 25, ignore_eos=True)
        engine.submit(first, collector.on_event)
        collector.wait(["first"])
        other = make_request("other", 70, 5, ignore_eos=True)
        engine.submit(other, collector.on_event)
        collector.wait(["other"])
        text = (*first.prompt_token_ids, *collector.tokens("first"), 5, 6, 7)
        second = make_request("second", text, 20, ignore_eos=True)
        engine.submit(second, collector.on_event)
        collector.wait(["second"])
        engine.close()
        assert engine.stats.prefix_tokens_total == 80
        assert (engine.stats.offload_disk_bytes > 0) == (disk > 0)
        assert collector.tokens("second") == generate_alone(weights, second)


def test_close_lets_running_requests_finish_and_refuses_new_ones(weights):
    engine, collector = make_engine(weights=weights), Collector()
    engine.start()
    engine.submit(make_request("a", 10, 60, ignore_eos=True), collector.on_event)
    collector.wait_tokens("a", 1)
    engine.close()
    assert collector.ends("a")[0].reason == "length"
    with pytest.raises(RequestRejected, match="shutting down") as refused:
        engine.submit(make_request("b", 1, 1), collector.on_event)
    assert refused.value.status == 503


def test_close_cancels_what_does_not_finish_in_time(weights):
    engine, collector = make_engine(weights=weights), Collector()
    engine.start()
    engine.submit(make_request("a", 10, 110, ignore_eos=True), collector.on_event)
    engine.close(timeout_s=0.0)
    assert collector.ends("a")[0].reason == "cancelled"


def test_a_failing_runner_ends_every_request_with_an_error(weights):
    engine, collector = make_engine(weights=weights), Collector()
    make_runner = engine._make_runner

    def failing():
        runner = make_runner()
        runner.collect = lambda launched: 1 / 0
        return runner

    engine._make_runner = failing
    engine.start()
    engine.submit(make_request("a", 10, 5), collector.on_event)
    collector.wait(["a"])
    (end,) = collector.ends("a")
    assert end.reason == "error"
    assert "ZeroDivisionError" in end.message
    engine.close()
    with pytest.raises(RequestRejected):
        engine.submit(make_request("b", 1, 1), collector.on_event)


def test_what_fails_before_the_first_request_is_raised_by_start(weights):
    engine = make_engine(weights=weights)
    engine._make_runner = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.start()


def test_tokens_outside_the_vocabulary_are_refused(weights):
    engine = make_engine(weights=weights)
    with pytest.raises(RequestRejected, match=r"\[0, 61\), but got 61"):
        engine.submit(make_request("a", (1, 61), 1), print)


def test_a_latency_target_caps_the_dense_batch(weights):
    engine = make_engine(weights=weights, latency=LatencyTarget(tpot_s=600e-6))
    assert engine._max_rows() == 32  # 1000 us at 64 rows, so 500 us at 32
    engine._time.measured_s[64] = 4000e-6
    assert engine._max_rows() == 16


def test_a_first_token_that_would_come_too_late_is_refused(weights):
    engine = make_engine(weights=weights, latency=LatencyTarget(ttft_s=5.0))
    engine._time.measured_s[64] = 1.0
    engine._thread = threading.current_thread()  # it never runs: the queue stays
    for index in range(3):
        engine.submit(make_request(f"r{index}", 90, 2), print)
    with pytest.raises(RequestRejected, match="first token would come in about 6") as refused:
        engine.submit(make_request("r3", 90, 2), print)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)


def test_sampling_follows_the_seed_whatever_else_is_in_the_batch(weights):
    wishes = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}
    alone = run_all(make_engine(weights=weights), [make_request("s", 10, 20, **wishes)])
    among = [make_request(f"r{i}", 15, 12) for i in range(6)]
    crowd = run_all(make_engine(weights=weights), [*among, make_request("s", 10, 20, **wishes)])
    assert alone.tokens("s") == crowd.tokens("s")
    assert alone.tokens("s") != generate_alone(weights, make_request("s", 10, 20))
    for request in among:
        assert crowd.tokens(request.request_id) == generate_alone(weights, request)


def test_log_probabilities_come_to_those_who_ask(weights):
    asked = make_request("asked", 10, 5, logprobs=3, ignore_eos=True)
    chosen_only = make_request("chosen", 10, 5, logprobs=0, ignore_eos=True)
    plain = make_request("plain", 10, 5, ignore_eos=True)
    collector = run_all(make_engine(weights=weights), [asked, chosen_only, plain])
    events = collector.events["asked"][:-1]
    for event in events:
        assert event.top_logprobs[0][0] == event.token_id
        assert event.top_logprobs[0][1] == pytest.approx(event.logprob, abs=1e-5)
        assert len(event.top_logprobs) == 3
    assert all(e.logprob < 0 and not e.top_logprobs for e in collector.events["chosen"][:-1])
    assert all(e.logprob is None for e in collector.events["plain"][:-1])


def test_two_ranks_generate_what_one_does_in_either_form(weights):
    requests = mixed_requests(12, seed=3)
    expected = {r.request_id: generate_alone(weights, r) for r in requests}
    with RankGroup(2) as ranks:
        for gathers in (False, True):
            assert ranks.call(serve_on_rank, requests, gathers)[0] == expected
