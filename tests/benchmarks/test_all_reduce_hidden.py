"""Costs of hidden all-reduces, who has more rounds, and what waits for what in each arrangement."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")


def turn(*us):
    return {"us": list(us), "mhz": [1500.0], "watts": [690.0]}


def times_of(hidden, **others):
    names = {"gemms": turn(1000, 1010)}
    for transport, (pipelined, independent, alone) in others.items():
        names[f"{transport} pipelined"] = turn(*pipelined)
        names[f"{transport} independent"] = turn(*independent)
        names[f"{transport} alone"] = turn(*alone)
    return names


def test_a_cost_is_formed_in_each_round_against_the_fastest_that_sums(load):
    hidden = load("all_reduce_hidden")
    times = times_of(
        hidden,
        nccl=((1400,), (1500,), (400,)),
        symm_two_shot_8=((1300, 1310), (1300, 1310), (200, 200)),
        copy_engine=((1100, 1130), (1080, 1090), (100, 100)),
    )
    found = hidden.costs(times, ["nccl", "symm_two_shot_8", "copy_engine"])
    assert found["copy_engine", "pipelined"] == pytest.approx([0.5, 0.6])
    assert found["nccl", "pipelined"] == pytest.approx([2.0])
    assert hidden.best(found, "pipelined", ["nccl", "copy_engine"]) == ("copy_engine", "pipelined")


def test_after_a_round_the_best_go_on_and_the_gemms_and_copy_engines_always(load):
    hidden = load("all_reduce_hidden")
    others = {
        f"symm_{index}": ((1100 + index,), (1100 + index,), (200 + index,)) for index in range(6)
    }
    others["copy_engine"] = ((1999,), (1999,), (99,))
    kept = hidden.contenders(times_of(hidden, **others))
    assert kept[0] == "gemms"
    assert [n for n in kept if n.startswith("symm") and n.endswith("pipelined")] == [
        f"symm_{index} pipelined" for index in range(3)
    ]
    assert "copy_engine pipelined" in kept
    assert "copy_engine alone" not in kept, "it does not sum, so it is no yardstick"
    assert "symm_1 alone" in kept
    assert "symm_2 alone" not in kept


def test_of_each_round_the_slowest_rank_counts(load):
    hidden = load("all_reduce_hidden")
    merged = hidden.slowest_rank([{"gemms": turn(10, 12)}, {"gemms": turn(11, 9)}])
    assert merged["gemms"]["us"] == [11, 12]


class FakeStreams:
    """Operations by stream, and what each comes behind."""

    def __init__(self, monkeypatch):
        self.ops, self.current = {}, None
        fake = self

        class Event:
            def record(self):
                self.seen = fake.behind(fake.current)

        class Stream:
            def __init__(self, name):
                self.name = name
                self.last = frozenset()

            def wait_stream(self, other):
                self.last |= other.last

            def wait_event(self, event):
                self.last |= event.seen

        @contextmanager
        def stream(which):
            before, fake.current = fake.current, which
            yield
            fake.current = before

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        self.gemm, self.network = Stream("gemm"), Stream("network")

    def behind(self, stream):
        return stream.last

    def op(self, name):
        self.ops[name] = (self.current.name, self.current.last)
        self.current.last |= {name}


@pytest.fixture
def enqueued(load, monkeypatch):
    workload = load("all_reduce_workload")

    def run(transport, arrangement):
        streams = FakeStreams(monkeypatch)
        load_of = object.__new__(workload.Workload)
        load_of.gemm_stream, load_of.reduce_stream = streams.gemm, streams.network
        load_of.reduce = lambda transport, pair: streams.op(f"reduce {pair}")
        load_of.gather = lambda pair: streams.op(f"gather {pair}")
        load_of.norm_half = lambda pair: streams.op(f"norm {pair}")
        load_of.run_gemm = lambda pair, which: streams.op(f"gemm {pair} {which}")

        def compute(transport, pair):
            streams.op(f"norm {pair - 1}")
            load_of.run_gemm(pair, 0)
            load_of.run_gemm(pair, 1)

        load_of.compute = compute
        load_of.enqueue(transport, arrangement)
        return streams.ops

    return run


@pytest.mark.parametrize("transport", ["copy_engine", "copy_engine_halves"])
def test_pipelined_all_reduces_wait_for_their_producers_and_are_waited_for(enqueued, transport):
    ops = enqueued(transport, "pipelined")
    last = "gather" if transport == "copy_engine_halves" else "reduce"
    for pair in range(6):
        name = f"reduce {pair}"
        assert ops[name][0] == "network"
        if pair > 0:
            assert f"gemm {pair - 1} 1" in ops[name][1], "the producer of the rows"
        assert f"gemm {pair} 0" not in ops[name][1], "it runs beside the other nano-batch"
        if pair < 5:
            assert f"{last} {pair}" in ops[f"gemm {pair + 1} 0"][1], "the consumer waits"
        if transport == "copy_engine_halves":
            assert f"reduce {pair}" in ops[f"norm {pair}"][1]
            assert f"norm {pair}" in ops[f"gather {pair}"][1]
            assert f"gemm {pair} 1" not in ops[f"gather {pair}"][1], "beside the second GEMM"


def test_independent_and_lone_all_reduces_wait_for_nobody(enqueued):
    for transport in ("copy_engine", "copy_engine_halves"):
        ops = enqueued(transport, "independent")
        assert all("reduce" not in other for other in ops["gemm 5 1"][1])
        assert all("gemm" not in other for other in ops["reduce 5"][1])
    ops = enqueued("copy_engine_halves", "alone")
    assert list(ops) == [f"{part} {pair}" for pair in range(6) for part in ("reduce", "gather")]


def test_gemms_alone_have_all_norms_and_no_all_reduce(enqueued):
    ops = enqueued("", "gemms")
    assert sum(name.startswith("norm") for name in ops) == 6
    assert not any(name.startswith("reduce") for name in ops)
