"""What `all_reduce_hidden.py` runs on a rank: GEMMs of llama2-70b TP2 layers beside all-reduces."""

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
        """All-reduce beside a pair; rows of the two nano-batches in turn."""
        from nanoflow_tune.runtime.kernels.registry import kernel

        run = kernel("all_reduce", transport, "cuda")
        run(self.partials[pair], self.group, self.reduce_sms, self._first_row(pair))

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
        for x, weight, out in self.gemms[pair]:
            self.gemm(x, weight, None, out, self.gemm_sms)

    def capture(self, transport: str, arrangement: str) -> torch.cuda.CUDAGraph:
        """A graph of `pipelined`, `independent`, `alone` (no GEMMs) or `gemms` (no all-reduce)."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            main = torch.cuda.current_stream()
            self.gemm_stream.wait_stream(main)
            self.reduce_stream.wait_stream(main)
            reduced: list[torch.cuda.Event] = []
            for pair in range(NUM_PAIRS):
                if arrangement == "pipelined":  # behind the pair that produced the rows
                    self.reduce_stream.wait_stream(self.gemm_stream)
                if arrangement != GEMMS:
                    with torch.cuda.stream(self.reduce_stream):
                        self.reduce(transport, pair)
                        reduced.append(torch.cuda.Event())
                        reduced[-1].record()
                if arrangement == "pipelined" and pair > 0:  # the consumer of those rows
                    self.gemm_stream.wait_event(reduced[pair - 1])
                if arrangement != "alone":
                    with torch.cuda.stream(self.gemm_stream):
                        self.compute(transport, pair)
            main.wait_stream(self.gemm_stream)
            main.wait_stream(self.reduce_stream)
        return graph

    def capture_calls(self, transport: str, rows: int) -> torch.cuda.CUDAGraph:
        """A graph of some all-reduces in a row on the whole GPU."""
        import torch

        from nanoflow_tune.runtime.kernels.registry import kernel

        run = kernel("all_reduce", transport, "cuda")
        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16).mul_(SCALE)
        run(x, self.group, self.num_sms)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(NUM_CALLS):
                run(x, self.group, self.num_sms)
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
