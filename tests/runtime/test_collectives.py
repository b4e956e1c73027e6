"""All-reduce pieces that need no GPU: sums of received rows, the exchange's protocol, plans."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from builders import NUM_SMS, sequential, tiny_model

from nanoflow_tune.runtime.kernels import (
    copy_engine,
    row_signals,
    symmetric_all_reduce,
    torch_ops,
)
from nanoflow_tune.runtime.kernels.registry import Received
from nanoflow_tune.runtime.launch import RankGroup
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import NanoOp
from nanoflow_tune.runtime.verify import cpu_case, verify_schedule


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_norm_of_received_rows_is_all_reduce_then_norm(rank):
    parts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(32).bfloat16()
    total = (parts[0].float() + parts[1].float() + parts[2].float()).bfloat16()
    residual = torch.randn(5, 32).bfloat16()
    expected, expected_out = residual.clone(), torch.empty_like(residual)
    torch_ops.norm(expected, total, weight, expected_out, 1e-5, 1)
    inbox = parts.clone()
    inbox[rank] = float("nan")  # never read: the own partial is the delta
    out = torch.empty_like(residual)
    torch_ops.norm(residual, parts[rank], weight, out, 1e-5, 1, Received(inbox, rank))
    assert torch.equal(residual, expected)
    assert torch.equal(out, expected_out)


@dataclass
class FakeBuffer:
    """Addresses of ranks far apart; no memory behind them."""

    rank: int
    world_size: int
    num_bytes: int
    flag_bytes: int

    @property
    def addresses(self):
        return tuple((peer + 1) << 40 for peer in range(self.world_size))

    def data(self, dtype):
        return torch.zeros(self.num_bytes // dtype.itemsize, dtype=dtype)


def be_rank(monkeypatch, rank, world_size):
    """This process becomes one rank of some, whose inboxes have no memory behind them."""
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(
        copy_engine,
        "SymmetricBuffer",
        lambda num_bytes, flag_bytes: FakeBuffer(rank, world_size, num_bytes, flag_bytes),
    )


def operations_of(monkeypatch, rank, world_size, signals, exchanges):
    """What the exchanges put on a rank's stream: (kind, address, value or bytes)."""
    issued = []
    be_rank(monkeypatch, rank, world_size)
    monkeypatch.setattr(row_signals, "_wait", lambda address: ("wait", address, 1))
    monkeypatch.setattr(row_signals, "_write", lambda address, value: ("write", address, value))
    monkeypatch.setattr(row_signals, "_enqueue", issued.extend)

    def copied(target, source, num_bytes):
        is_signal = num_bytes == 4
        issued.append(("write", target, 1) if is_signal else ("copy", target, num_bytes))

    monkeypatch.setattr(row_signals, "copy", copied)
    monkeypatch.setattr(copy_engine, "copy", copied)
    inbox = copy_engine.Inbox(64, 8, torch.float32, signals)
    assert issued == []
    ends = []
    for first_row, num_rows in exchanges:
        inbox.exchange(torch.zeros(num_rows, 8), first_row)
        ends.append(len(issued))
    return issued, ends


@pytest.mark.parametrize("signals", ["write", "copy"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_an_exchange_is_right_under_every_timing(monkeypatch, signals, world_size):
    """Ranks' streams advance in random turns; a reader follows each exchange, as a norm does.

    Signals are raised only when they are down, rows arrive before "sent" is seen and are not
    written again before they are read, nobody hangs, and all signals end as they began.
    """
    exchanges = [(0, 5), (0, 3), (5, 2), (0, 5), (0, 5)]
    streams, ends = [], []
    for rank in range(world_size):
        issued, mine = operations_of(monkeypatch, rank, world_size, signals, exchanges)
        streams.append(issued)
        ends.append(mine)
    for seed in range(200):
        rng = random.Random(seed)
        memory: dict[int, int] = {}
        rows: dict[int, int] = {}  # address -> exchange whose rows lie there
        unread: set[int] = set()
        place = [0] * world_size
        current = [0] * world_size  # exchange that each rank is in
        while any(place[r] < len(streams[r]) for r in range(world_size)):
            able = [
                r
                for r in range(world_size)
                if place[r] < len(streams[r])
                and (
                    streams[r][place[r]][0] != "wait" or memory.get(streams[r][place[r]][1], 0) == 1
                )
            ]
            assert able, "all ranks wait"
            rank = rng.choice(able)
            kind, address, value = streams[rank][place[rank]]
            if kind == "write":
                assert memory.get(address, 0) != value, "a signal was lost"
                memory[address] = value
            elif kind == "copy":
                assert address not in unread, "rows were overwritten before they were read"
                rows[address] = current[rank]
                unread.add(address)
            place[rank] += 1
            if place[rank] == ends[rank][current[rank]]:
                mine = {a for a in rows if a >> 40 == rank + 1 and a in unread}
                first_row, _ = exchanges[current[rank]]
                arrived = [a for a in mine if rows[a] == current[rank]]
                assert len(arrived) == world_size - 1, f"rows {first_row} are not all there"
                unread -= set(arrived)  # the norm has read them
                current[rank] += 1
        assert not any(memory.values())


@pytest.mark.parametrize(("rank", "world_size", "num_rows"), [(0, 2, 7), (1, 2, 7), (2, 4, 5)])
def test_scattered_rows_go_to_the_rank_whose_shard_they_are(
    monkeypatch, rank, world_size, num_rows
):
    copies = []
    be_rank(monkeypatch, rank, world_size)
    monkeypatch.setattr(row_signals.RowSignals, "meet", lambda self, phase, row: None)
    monkeypatch.setattr(copy_engine, "copy", lambda *region: copies.append(region))
    inbox = copy_engine.Inbox(64, 8, torch.float32)
    x, first_row, row_bytes = torch.zeros(num_rows, 8), 11, 32
    inbox.scatter(x, first_row)
    slot_rows = 64 + 16
    expected = {}
    for peer in range(world_size):
        start, end = row_signals.shard_of(num_rows, peer, world_size)
        if peer != rank and end > start:
            base = ((peer + 1) << 40) + row_signals.signal_bytes(64, world_size)
            place = base + (rank * slot_rows + first_row + start) * row_bytes
            expected[place] = (x.data_ptr() + start * row_bytes, (end - start) * row_bytes)
    assert {target: rest for target, *rest in copies} == {
        target: list(rest) for target, rest in expected.items()
    }
    assert len(copies) == len(expected)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 8, 129])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shards_of_rows_cover_them_once(num_rows, world_size):
    shards = [row_signals.shard_of(num_rows, rank, world_size) for rank in range(world_size)]
    assert [row for start, end in shards for row in range(start, end)] == list(range(num_rows))


def test_rows_that_do_not_fit_the_inbox_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"64 rows of 8 .* got rows \[60, 70\)"):
        operations_of(monkeypatch, 0, 2, "write", [(60, 10)])


def test_only_variants_without_sms_may_have_a_share_of_none():
    free = NanoOp(
        op="attn_all_reduce", tokens=(0, 8), lane="network", num_sms=0, variant="copy_engine"
    )
    assert free.num_sms == 0
    with pytest.raises(ValueError, match="copy_engine"):
        replace(free, variant="nccl")


def test_an_all_reduce_without_sms_leaves_all_of_them_to_the_gemms():
    graph = OpGraph.build(tiny_model(num_layers=2), 2)
    check(_on_copy_engines(graph, 32, 8), graph, NUM_SMS, 8)


def _on_copy_engines(graph, rows, decodes):
    schedule = sequential(graph, rows, decodes)
    nano_ops = tuple(
        replace(op, lane="network", num_sms=0, variant="copy_engine")
        if graph.op(op.op).kind == "all_reduce"
        else op
        for op in schedule.nano_ops
    )
    return replace(schedule, nano_ops=nano_ops)


def test_on_a_cpu_the_copy_engine_variant_is_the_torch_one():
    model = tiny_model(num_layers=2)
    schedule = _on_copy_engines(OpGraph.build(model, 2), 32, 8)
    with RankGroup(2) as ranks:
        records = ranks.call(verify_schedule, cpu_case(model, schedule, 2))
    assert all(record.passed and record.max_relative_error == 0.0 for record in records)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_kernels_compile_without_spills(world_size, element_bytes):
    pytest.importorskip("cuda.bindings.nvrtc")
    kernel = symmetric_all_reduce.all_reduce_kernel("two_shot", world_size, element_bytes)
    log = kernel.compile().log
    assert "bytes spill" in log
    assert log.count(" 0 bytes spill stores") == log.count("bytes spill stores")


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("packs", [1, 7, 16, 129, 1000])
def test_shards_cover_all_packs_once_and_fit_the_buffer(world_size, packs):
    """The arithmetic of cuda/all_reduce.cu: shards, slots of both phases, bytes."""
    shard = -(-packs // world_size)
    covered = [
        peer * shard + place
        for peer in range(world_size)
        for place in range(max(0, min(shard, packs - peer * shard)))
    ]
    assert covered == list(range(packs))
    last = 2 * world_size * shard  # results lie behind the slots
    assert last * 16 <= symmetric_all_reduce.slot_bytes(packs, world_size)
    assert world_size * packs * 16 <= symmetric_all_reduce.slot_bytes(packs, world_size)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.float16), "bfloat16 or float32"),
        (torch.zeros(8, 8).t()[:, :4], "contiguous"),
        (torch.zeros(1, 3), "multiples of 16"),
    ],
)
def test_rows_that_kernels_cannot_take_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        symmetric_all_reduce.num_packs(x)
