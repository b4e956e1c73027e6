"""What `all_reduce_hidden.py` runs on a rank: GEMMs of llama2-70b TP2 layers beside all-reduces.

`copy_engine_halves` is an all-reduce and its norm in three parts. Copy engines send the peer its
half of the rows beside the first GEMM of the other nano-batch's pair; between its two GEMMs this
rank sums and normalises its own half; beside the second GEMM copy engines send that half of the
normalised rows to the peer. As many bytes cross the links, but each rank's norm reads and writes
half as much, and the residual of the other half of the rows stays on the peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoflow_tune.runtime.launch import RankContext

if TYPE_CHECKING:
    import torch

HIDDEN = 8192
PAIRS = (((5120, 8192), (8192, 4096)), ((28672, 8192), (8192, 14336)))
"""(N, K) of kqv and o_proj, of up_gate and down on one of two ranks."""
NUM_LAYERS = 3
NUM_PAIRS = 2 * NUM_LAYERS
GEMMS = "gemms"
HALVES = "copy_engine_halves"
SUMS_LATER = ("copy_engine", HALVES)
"""Transports whose all-reduces, run alone, move rows only: norms sum."""
SCALE = 2.0**-60
"""Of the data at the start of a turn: in-place sums over two ranks double it at each call."""
MAX_DOUBLINGS = 110
"""Replays after which the data must be small again: squares in the norm stay finite."""
NUM_CALLS = 8
"""All-reduces in a row in the graph of one transport at one size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the ranks need to know."""

    gemm: str
    transports: tuple[str, ...]
    tokens: int
    share: int
    rounds: int


class Workload:
    """Operands, streams and graphs on one rank."""

    def __init__(self, ctx: RankContext, options: Options) -> None:
        import torch

        from nanoflow_tune.runtime import kernels
        from nanoflow_tune.runtime.device import lane_groups
        from nanoflow_tune.runtime.kernels import registry

        kernels.load("cuda")
        groups = lane_groups(ctx, ())
        assert groups is not None
        self.group: Any = groups["network"]  # before partitions
        self.rows = options.tokens
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.gemm_sms, self.reduce_sms = self.num_sms - options.share, self.num_sms
        self.gemm_stream, self.reduce_stream = torch.cuda.Stream(), torch.cuda.Stream()
        if options.share:
            self.reduce_sms = options.share
            self.gemm_stream, self.reduce_stream = self._partitions(options.share)
        self.gemm = registry.kernel("gemm", options.gemm, "cuda")
        self.norm = registry.kernel("norm", "triton", "cuda")
        new = _Random(ctx.rank)
        self.gemms = [
            [
                (new(self.rows, k), new(n, k, scale=k**-0.5), new(self.rows, n))
                for n, k in PAIRS[pair % 2]
            ]
            for pair in range(NUM_PAIRS)
        ]
        self.partials = [new(self.rows, HIDDEN) for _ in range(NUM_PAIRS)]
        self.residual, self.normed = new(self.rows, HIDDEN), new(self.rows, HIDDEN)
        self.norm_weight = new(HIDDEN)
        engine = self.group["copy_engine"]
        self.inbox = engine.inbox(2 * self.rows, HIDDEN, torch.bfloat16)
        self.gathered: Any = self.group["gathered"].buffer(
            2 * self.rows, HIDDEN, torch.bfloat16, HALVES
        )

    def _partitions(self, share: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        from nanoflow_tune.runtime.partition_layout import GroupRange
        from nanoflow_tune.runtime.sm_partition import SmPartitions

        self.owner = SmPartitions(self.num_sms, 8)
        size, end = share // 8, self.owner.split.num_groups
        front = GroupRange(start=0, end=size)
        back = GroupRange(start=size, end=end, has_remainder=self.owner.split.remainder > 0)
        return self.owner.stream_of(back), self.owner.stream_of(front)

    def refresh(self) -> None:
        """Small random partials, so that sums in place stay finite through a turn."""
        for tensor in (*self.partials, self.residual):
            tensor.normal_().mul_(SCALE)

    def reduce(self, transport: str, pair: int) -> None:
        """All-reduce beside a pair, of halves the first part; rows of two nano-batches in turn."""
        from nanoflow_tune.runtime.kernels.registry import kernel

        if transport == HALVES:
            self.inbox.scatter(self.partials[pair], self._first_row(pair))
            return
        run = kernel("all_reduce", transport, "cuda")
        run(self.partials[pair], self.group, self.reduce_sms, self._first_row(pair))

    def gather(self, pair: int) -> None:
        """The last part of halves: normalised rows to the peer."""
        self.gathered.exchange_rows(self._first_row(pair), self.rows)

    def _first_row(self, pair: int) -> int:
        return pair % 2 * self.rows

    def compute(self, transport: str, pair: int) -> None:
        """The norm that consumes the all-reduce before, then the pair's two GEMMs."""
        before, received = (pair - 1) % NUM_PAIRS, None
        if transport == "copy_engine":
            first = self._first_row(before)
            received = self.inbox.received(first, first + self.rows)
        self.norm(
            self.residual,
            self.partials[before],
            self.norm_weight,
            self.normed,
            1e-5,
            self.gemm_sms,
            received,
        )
        self.run_gemm(pair, 0)
        self.run_gemm(pair, 1)

    def run_gemm(self, pair: int, which: int) -> None:
        """One of the pair's two GEMMs."""
        x, weight, out = self.gemms[pair][which]
        self.gemm(x, weight, None, out, self.gemm_sms)

    def norm_half(self, pair: int) -> None:
        """Sum and normalise this rank's half of the rows that `reduce` sent, into `gathered`."""
        from nanoflow_tune.runtime.kernels.row_signals import shard_of

        start, end = shard_of(self.rows, self.inbox.rank, self.inbox.world_size)
        first = self._first_row(pair)
        self.norm(
            self.residual[start:end],
            self.partials[pair][start:end],
            self.norm_weight,
            self.gathered.rows_TD[first + start : first + end],
            1e-5,
            self.gemm_sms,
            self.inbox.received(first + start, first + end),
        )

    def run(self, transport: str, pair: int, arrangement: str) -> None:
        """All of a pair once, on the current stream: compiles, and allocates symmetric memory."""
        if arrangement != GEMMS:
            self.reduce(transport, pair)
        if transport == HALVES:
            self.norm_half(pair)
            self.gather(pair)
        self.compute(transport, pair)

    def capture(self, transport: str, arrangement: str) -> torch.cuda.CUDAGraph:
        """A graph of `pipelined`, `independent`, `alone` (no GEMMs) or `gemms` (no all-reduce)."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            main = torch.cuda.current_stream()
            self.gemm_stream.wait_stream(main)
            self.reduce_stream.wait_stream(main)
            self.enqueue(transport, arrangement)
            main.wait_stream(self.gemm_stream)
            main.wait_stream(self.reduce_stream)
        return graph

    def enqueue(self, transport: str, arrangement: str) -> None:
        """All pairs on the two streams, with the waits of an arrangement."""
        import torch

        waits, done = arrangement == "pipelined", list[torch.cuda.Event]()
        for pair in range(NUM_PAIRS):
            reduced, normed = torch.cuda.Event(), torch.cuda.Event()
            if waits:  # behind the pair that produced the rows
                self.reduce_stream.wait_stream(self.gemm_stream)
            if arrangement != GEMMS:
                with torch.cuda.stream(self.reduce_stream):
                    self.reduce(transport, pair)
                    reduced.record()
                    if transport != HALVES:
                        done.append(reduced)
            if waits and pair > 0:  # the consumer of those rows
                self.gemm_stream.wait_event(done[pair - 1])
            if arrangement != "alone":
                with torch.cuda.stream(self.gemm_stream):
                    if transport != HALVES:
                        self.compute(transport, pair)
                        continue
                    self.run_gemm(pair, 0)
                    if waits:
                        self.gemm_stream.wait_event(reduced)
                    self.norm_half(pair)
                    normed.record()
                    self.run_gemm(pair, 1)
                if waits:
                    self.reduce_stream.wait_event(normed)
            if transport == HALVES:
                with torch.cuda.stream(self.reduce_stream):
                    self.gather(pair)
                    done.append(torch.cuda.Event())
                    done[-1].record()

    def capture_calls(self, transport: str, rows: int) -> torch.cuda.CUDAGraph:
        """A graph of some all-reduces in a row on the whole GPU."""
        import torch

        from nanoflow_tune.runtime.kernels.registry import kernel

        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16).mul_(SCALE)

        def run() -> None:
            if transport == HALVES:
                self.inbox.scatter(x, 0)
                self.gathered.exchange_rows(0, rows)
            else:
                kernel("all_reduce", transport, "cuda")(x, self.group, self.num_sms)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(NUM_CALLS):
                run()
        self.kept = x
        return graph


class _Random:
    """Random normal bf16 tensors, other ones on each rank."""

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator(device="cuda").manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        import torch

        out = torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
        return out.normal_(0.0, scale, generator=self._generator)
