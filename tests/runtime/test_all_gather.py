"""All-gather without a GPU: gloo ranks, the push kernel's walk, the copies' addresses, refusals."""

from __future__ import annotations

import random

import pytest
import rank_functions
import torch
import torch.distributed as dist

from nanoflow_tune.runtime.kernels import all_gather, gather_buffer, row_signals, torch_ops
from nanoflow_tune.runtime.kernels.gather_buffer import GatherBuffers, check_shapes, output_rows
from nanoflow_tune.runtime.launch import RankGroup


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [2, 7])
def test_all_columns_are_on_every_rank_for_any_split_of_the_rows(world_size, num_rows):
    width = 5
    with RankGroup(world_size) as ranks:
        results = ranks.call(rank_functions.gathered_columns, num_rows, width)
    expected = [
        [
            rank * 10_000.0 + row * 100.0 + column
            for rank in range(world_size)
            for column in range(width)
        ]
        for row in range(num_rows)
    ]
    for tensors in results:
        for tensor in tensors:
            assert tensor[1:-1].tolist() == expected
            assert bool(tensor[0].isnan().all() and tensor[-1].isnan().all())


def test_one_rank_without_a_group_copies():
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    torch_ops.all_gather(x, out, None, 1)
    assert torch.equal(x, out)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), "all 2 ranks, 3 x 8 torch.float32, but is 3 x 4"),
        (torch.zeros(3, 4), torch.zeros(2, 8), "3 x 8 torch.float32, but is 2 x 8"),
        (torch.zeros(3, 4), torch.zeros(3, 8).bfloat16(), "but is 3 x 8 torch.bfloat16"),
        (torch.zeros(4, 3).t(), torch.zeros(3, 8), "next to each other"),
    ],
)
def test_operands_that_are_no_shard_and_whole_are_refused(x, out, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(x, out, 2)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 4, dtype=torch.bfloat16),  # 8 bytes wide
        torch.zeros(4, 12, dtype=torch.bfloat16)[:, :8],  # rows 24 bytes apart
        torch.zeros(4, 16, dtype=torch.bfloat16)[:, 1:9],  # starts in between
    ],
)
def test_columns_that_kernels_cannot_move_are_refused(x):
    with pytest.raises(ValueError, match=r"multiples of 16 bytes.*nccl"):
        all_gather.check_packs(x)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_kernel_compiles_without_spills(world_size):
    pytest.importorskip("cuda.bindings.nvrtc")
    log = all_gather.all_gather_kernel(world_size).compile().log
    assert "0 bytes spill stores, 0 bytes spill loads" in log


@pytest.mark.parametrize("rows", [1, 7, 129])
@pytest.mark.parametrize("row_packs", [1, 3, 32, 700])
@pytest.mark.parametrize("blocks", [1, 8, 32])
def test_the_walk_of_the_kernel_meets_every_pack_once(rows, row_packs, blocks):
    """The arithmetic of `Place` in cuda/all_gather.cu, for every thread at once."""
    threads, unroll = 512, 4
    step_row, step_column = divmod(blocks * threads, row_packs)
    row, column = (
        part.to(torch.int64)
        for part in (
            torch.arange(blocks * threads) // row_packs,
            torch.arange(blocks * threads) % row_packs,
        )
    )
    met = torch.zeros(rows * row_packs, dtype=torch.int64)
    while bool((row < rows).any()):
        runs = row < rows  # a thread whose first place is outside ends
        for _ in range(unroll):
            inside = runs & (row < rows)
            met += ((row * row_packs + column)[inside]).bincount(minlength=rows * row_packs)
            row, column = row + step_row, column + step_column
            is_over = column >= row_packs
            row, column = row + is_over, column - row_packs * is_over
            assert bool((column < row_packs).all())
    assert bool((met == 1).all())


class FakeBuffer:
    """Addresses of ranks far apart; local memory only to tell places by."""

    def __init__(self, rank, world_size, num_bytes, flag_bytes):
        self.rank, self.world_size = rank, world_size
        self.num_bytes, self.flag_bytes = num_bytes, flag_bytes
        self.bytes = torch.zeros(flag_bytes + num_bytes, dtype=torch.uint8)

    @property
    def addresses(self):
        own = self.bytes.data_ptr()
        return tuple(own if r == self.rank else (r + 1) << 50 for r in range(self.world_size))

    def data(self, dtype):
        return self.bytes[self.flag_bytes :].view(dtype)


@pytest.fixture
def fake_buffers(monkeypatch):
    """Makes `GatherBuffers` of one rank, and lists what they put on the stream."""

    def make(rank, world_size, signals="write"):
        issued = []
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
        monkeypatch.setattr(
            gather_buffer,
            "SymmetricBuffer",
            lambda num_bytes, flag_bytes: FakeBuffer(rank, world_size, num_bytes, flag_bytes),
        )
        monkeypatch.setattr(row_signals, "_wait", lambda address: ("wait", address))
        monkeypatch.setattr(row_signals, "_write", lambda address, value: ("write", address, value))
        monkeypatch.setattr(row_signals, "_enqueue", issued.extend)
        monkeypatch.setattr(
            row_signals, "copy", lambda target, _, num_bytes: issued.append(("write", target, 1))
        )
        monkeypatch.setattr(
            gather_buffer, "copy_rows", lambda *region: issued.append(("rows", *region))
        )
        return GatherBuffers(signals), issued

    return make


@pytest.mark.parametrize(("rank", "world_size", "num_rows"), [(0, 2, 5), (2, 3, 7), (3, 4, 3)])
def test_a_shard_of_rows_goes_to_the_same_place_on_every_peer(
    fake_buffers, monkeypatch, rank, world_size, num_rows
):
    buffers, issued = fake_buffers(rank, world_size)
    monkeypatch.setattr(gather_buffer, "copy", lambda *region: issued.append(("rows", *region)))
    buffer = buffers.buffer(64, 4, torch.float32)
    first_row, row_bytes = 9, 16
    buffer.exchange_rows(first_row, num_rows)
    copies = [op[1:] for op in issued if op[0] == "rows"]
    start, end = row_signals.shard_of(num_rows, rank, world_size)
    source = buffer.rows_TD[first_row + start :].data_ptr()
    offset = row_signals.signal_bytes(2048, world_size) + (first_row + start) * row_bytes
    peers = [peer for peer in range(world_size) if peer != rank]
    assert sorted(copies) == [
        (((peer + 1) << 50) + offset, source, (end - start) * row_bytes)
        for peer in peers
        if end > start
    ]
    kinds = [op[0] for op in issued if op[0] != "rows"]
    assert kinds.count("wait") == 2 * len(peers)
    with pytest.raises(ValueError, match="holds 2048 rows"):
        buffer.exchange_rows(2047, 2)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (2, 3)])
def test_copies_fill_this_ranks_columns_on_every_rank(fake_buffers, rank, world_size, in_place):
    buffers, issued = fake_buffers(rank, world_size)
    width, first_row, num_rows = 4 * world_size, 5, 3
    whole = output_rows({gather_buffer.KEY: buffers}, 64, width, torch.float32, torch.device("cpu"))
    out = whole[first_row : first_row + num_rows]
    x = out[:, rank * 4 : rank * 4 + 4] if in_place else torch.zeros(num_rows, 4)
    buffer = buffers.find(out, first_row)
    buffer.exchange(x, first_row)
    copies = [op[1:] for op in issued if op[0] == "rows"]
    own = whole.data_ptr()
    flag_bytes = row_signals.signal_bytes(2048, world_size)
    starts = [own if r == rank else ((r + 1) << 50) + flag_bytes for r in range(world_size)]
    pitch = 4 * width
    expected = {
        (
            start + first_row * pitch + rank * 16,
            pitch,
            x.data_ptr(),
            pitch if in_place else 16,
            16,
            num_rows,
        )
        for start in starts
        if not (in_place and start == own)
    }
    assert set(copies) == expected
    assert len(copies) == len(expected)
    kinds = [op[0] for op in issued]
    assert kinds.index("wait") < kinds.index("rows") < len(kinds) - kinds[::-1].index("wait")


@pytest.mark.parametrize("signals", ["write", "copy"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_rank_is_written_before_it_is_free_and_all_columns_arrive(
    fake_buffers, signals, world_size
):
    """Ranks' streams advance in random turns; a reader follows each exchange."""
    calls = [(0, 5), (0, 5), (5, 2), (0, 3), (0, 5)]
    streams, ends = [], []
    for rank in range(world_size):
        buffers, issued = fake_buffers(rank, world_size, signals)
        buffer = buffers.buffer(64, 4 * world_size, torch.float32)
        own = buffer.addresses(0)[rank] - (rank * 16)
        mine = []
        for first_row, num_rows in calls:
            buffer.exchange(torch.zeros(num_rows, 4), first_row)
            mine.append(len(issued))
        flags = (own - buffer._buffer.flag_bytes, (rank + 1) << 50)  # own memory as peers see it

        def moved(op, flags=flags):
            kind, address, *rest = op
            far = address - flags[0] + flags[1] if 0 <= address - flags[0] < 1 << 40 else address
            return (kind, far, *rest)

        streams.append([moved(op) for op in issued])
        ends.append(mine)
    for seed in range(100):
        rng, signal, unread = random.Random(seed), {}, {}
        place, current = [0] * world_size, [0] * world_size
        while any(place[r] < len(streams[r]) for r in range(world_size)):
            able = [
                r
                for r in range(world_size)
                if place[r] < len(streams[r])
                and (streams[r][place[r]][0] != "wait" or signal.get(streams[r][place[r]][1]) == 1)
            ]
            assert able, "all ranks wait"
            rank = rng.choice(able)
            kind, address, *rest = streams[rank][place[rank]]
            if kind == "write":
                assert signal.get(address, 0) != rest[0], "a signal was lost"
                signal[address] = rest[0]
            elif kind == "rows":
                target = (address >> 50) - 1
                assert (target, rank) not in unread, "overwritten before it was read"
                unread[target, rank] = current[rank]
            place[rank] += 1
            if place[rank] == ends[rank][current[rank]]:
                arrived = [key for key, call in unread.items() if call == current[rank]]
                senders = {sender for target, sender in arrived if target == rank}
                assert senders == set(range(world_size))
                for sender in senders:
                    del unread[rank, sender]
                current[rank] += 1
        assert not any(signal.values())


def test_outputs_elsewhere_or_at_other_rows_are_refused(fake_buffers):
    buffers, _ = fake_buffers(0, 2)
    rows = buffers.buffer(64, 8, torch.float32).rows_TD
    assert buffers.find(rows[3:10], 3).width == 8
    with pytest.raises(ValueError, match=r"rows from 0 on .* but it starts at row 3; bind"):
        buffers.find(rows[3:10], 0)
    with pytest.raises(ValueError, match=r"starts at other memory; bind .* or use an `nccl`"):
        buffers.find(torch.zeros(7, 8), 0)
    with pytest.raises(ValueError, match="other memory"):  # the spare rows belong to nobody
        buffers.find(rows[2047:2049], 2047)
    with pytest.raises(ValueError, match="other memory"):
        buffers.find(rows[3:10, :4], 3)


def test_a_larger_buffer_is_made_beside_the_first_and_both_are_found(fake_buffers):
    buffers, _ = fake_buffers(0, 2)
    small = buffers.buffer(10, 8, torch.float32)
    large = buffers.buffer(5000, 8, torch.float32)
    assert small is buffers.buffer(2048, 8, torch.float32)
    assert large.num_rows == 5000
    assert buffers.find(small.rows_TD[:4], 0) is small
    assert buffers.find(large.rows_TD[:4], 0) is large


def test_an_executors_gathered_rows_are_found_where_the_binder_says_and_have_guards(fake_buffers):
    """Two activations of one width lie apart, each with guard rows in the peers' sight."""
    from builders import tiny_model

    from nanoflow_tune.runtime.buffers import GUARD_ROWS, Buffers
    from nanoflow_tune.runtime.weights import random_weights

    cpu = torch.device("cpu")
    model = tiny_model(hidden_size=64, num_layers=1)  # 8 heads of 8: as wide as hidden
    weights = random_weights(model, tp_degree=2, device=cpu, with_o_columns=True)
    made, _ = fake_buffers(0, 2)
    group = {gather_buffer.KEY: made}

    def new_rows(name, num_rows, width):
        return output_rows(group, num_rows, width, torch.float32, cpu, name)

    buffers = Buffers.allocate(weights, 40).with_gathered(weights, new_rows)
    assert buffers.heads_TA.shape == buffers.o_TD.shape == (40, 64)
    assert buffers.o_columns_TW.shape == (40, 32)
    assert made.find(buffers.heads_TA[8:20], GUARD_ROWS + 8) is not made.find(
        buffers.o_TD[8:20], GUARD_ROWS + 8
    )
    assert buffers.broken_guards() == ()
    rows = made.find(buffers.o_TD, GUARD_ROWS).rows_TD
    for row, names in ((GUARD_ROWS, ()), (GUARD_ROWS - 1, ("o_TD",)), (GUARD_ROWS + 40, ("o_TD",))):
        buffers.poison()
        rows[row] = 1.0
        assert buffers.broken_guards() == names
    again = Buffers.allocate(weights, 30).with_gathered(weights, new_rows)
    assert again.o_TD.data_ptr() == buffers.o_TD.data_ptr()  # the peers know that memory
