"""Kernel variants by op kind: what the profiler times, the search chooses and the executor runs.

Every variant of a kind has the same signature, given by the Protocols below. A variant writes only
the rows it was given. `num_sms` is the share it runs on: persistent kernels size their grid by it.

Shape legend: T rows of the call, D hidden, W columns of one rank, K GEMM depth, N GEMM width,
C = (qo + 2 kv) x head dim, Q = qo heads x head dim, F ffn width, R decode rows, S prefill segments,
P pages, G kv heads, B tokens of a page, H head dim, E experts, J experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..op_graph import OpKind


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Heads of one tensor-parallel rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def qo_size(self) -> int:
        """Width of queries and of attention output."""
        return self.num_qo_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of keys, and of values."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Decode rows of a token range: each row is one request reading its own KV cache."""

    row_ids_R: Tensor
    """int32: row of the dense batch."""
    kv_lens_R: Tensor
    """int32: keys in the cache, the row's own included."""
    page_table_RP: Tensor
    """int32: pages of each request, in order; padded with 0."""
    max_kv_len: int

    @property
    def num_rows(self) -> int:
        """R."""
        return self.row_ids_R.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """Prefill rows of a token range: segments of consecutive tokens, one request each."""

    row_starts_S: Tensor
    """int32: first dense-batch row of the segment."""
    num_rows_S: Tensor
    """int32."""
    position_starts_S: Tensor
    """int32: position of the first row within its request; row i attends to keys 0..start + i."""
    page_table_SP: Tensor
    """int32, padded with 0."""
    segment_rows: tuple[int, ...]
    """`num_rows_S` on the host: persistent kernels build their work list from it."""
    max_kv_len: int

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.segment_rows)


class Gemm(Protocol):
    """out_TN = x_TK @ weight_NK^T (+ bias_N)."""

    def __call__(
        self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
    ) -> None:
        """Launch on the current stream."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """Partial rows that the peers sent, where an all-reduce leaves the sum to its reader."""

    parts_WTD: Tensor
    """By rank (W); the place of this rank is not used: its own partial is the `delta_TD`."""
    rank: int


LEAVES_SUM = ("copy_engine",)
"""All-reduce variants (CUDA) after which `Received` holds the peers' rows: their reader sums."""


class GroupedGemm(Protocol):
    """out_TN[t] = weight_ENK[e] @ x_TK[t], rows sorted by expert: those of e end at offsets_E[e].

    T counts routed rows. offsets_E is int32 on the device and rises from 0 or more to T. It may
    change between replays of a CUDA graph: no variant of the GPU reads it on the host.
    """

    def __call__(
        self, x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, out_TN: Tensor, num_sms: int
    ) -> None:
        """Launch on the current stream."""
        ...


class GroupedGemmSilu(Protocol):
    """`GemmSilu` of rows sorted by expert, as in `GroupedGemm`; weight_E2FK holds up, then gate."""

    def __call__(
        self,
        x_TK: Tensor,
        weight_E2FK: Tensor,
        offsets_E: Tensor,
        scratch_T2F: Tensor,
        out_TF: Tensor,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class MoeRouter(Protocol):
    """Send each row to the J experts with the largest logits x_TD @ weight_ED^T.

    routed_RD (R = T x J) are the rows sorted by expert and, within one, in the order of x_TD; those
    of expert e end at offsets_E[e]. Row t went to places_TJ[t], best expert first (both int32),
    with fp32 weights_TJ[t], the softmax over its J logits.
    """

    def __call__(
        self,
        x_TD: Tensor,
        weight_ED: Tensor,
        routed_RD: Tensor,
        offsets_E: Tensor,
        places_TJ: Tensor,
        weights_TJ: Tensor,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class MoeCombine(Protocol):
    """out_TD[t] = sum over j of weights_TJ[t, j] x rows_RD[places_TJ[t, j]], in fp32."""

    def __call__(
        self,
        rows_RD: Tensor,
        places_TJ: Tensor,
        weights_TJ: Tensor,
        out_TD: Tensor,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class Norm(Protocol):
    """residual_TD += delta_TD (when given); out_TD = RMSNorm(residual_TD) * weight_D.

    With `received`, what is added is the sum of delta_TD and the peers' parts in rank order, in
    fp32, rounded to the dtype of delta_TD: the same bits as an all-reduce before the norm.
    """

    def __call__(
        self,
        residual_TD: Tensor,
        delta_TD: Tensor | None,
        weight_D: Tensor,
        out_TD: Tensor,
        eps: float,
        num_sms: int,
        received: Received | None = None,
    ) -> None:
        """Launch on the current stream."""
        ...


class RopeAppend(Protocol):
    """Rotate q and k of qkv_TC in place (half-split form); append k and v to the paged cache.

    cos_sin_LH is fp32 with L positions: H / 2 cosines, then H / 2 sines. Row t goes to slot
    slots_T[t] = page * page_size + offset of k_pages_PGBH and v_pages_PGBH.
    """

    def __call__(
        self,
        qkv_TC: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cos_sin_LH: Tensor,
        k_pages_PGBH: Tensor,
        v_pages_PGBH: Tensor,
        heads: HeadShape,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class DecodeAttention(Protocol):
    """out[row] = softmax(q[row] K^T / sqrt(H)) V over the row's own request, GQA.

    qkv_TC and out_TQ are whole dense-batch buffers; rows.row_ids_R selects.
    """

    def __call__(
        self,
        qkv_TC: Tensor,
        k_pages_PGBH: Tensor,
        v_pages_PGBH: Tensor,
        rows: DecodeRows,
        out_TQ: Tensor,
        heads: HeadShape,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class PrefillAttention(Protocol):
    """Causal attention of each segment's rows over its request's cached keys, GQA."""

    def __call__(
        self,
        qkv_TC: Tensor,
        k_pages_PGBH: Tensor,
        v_pages_PGBH: Tensor,
        rows: PrefillRows,
        out_TQ: Tensor,
        heads: HeadShape,
        num_sms: int,
    ) -> None:
        """Launch on the current stream."""
        ...


class GemmSilu(Protocol):
    """out_TF = silu(x_TK @ gate^T) * (x_TK @ up^T).

    weight_2FK holds up in its first F rows, gate after. Unfused variants write both products,
    rounded to the dtype, to scratch_T2F; fused ones leave it alone. Names tell which is which
    (`op_shapes.UNFUSED_PREFIXES`), since bytes and joules are counted from a profile alone.
    """

    def __call__(
        self, x_TK: Tensor, weight_2FK: Tensor, scratch_T2F: Tensor, out_TF: Tensor, num_sms: int
    ) -> None:
        """Launch on the current stream."""
        ...


class AllReduce(Protocol):
    """Sum x_TD over the ranks, in place; variants of LEAVES_SUM only fetch what is to be added.

    `group` is what `Resources.groups` holds for the lane: a ProcessGroup on a CPU, on CUDA what
    `collectives.make_groups` gives. `first_row` is the place of x_TD's first row in the dense
    batch: calls that run side by side have different ones.
    """

    def __call__(
        self,
        x_TD: Tensor,
        group: Any,  # noqa: ANN401
        num_sms: int,
        first_row: int = 0,
    ) -> None:
        """Launch on the current stream."""
        ...


class AllGather(Protocol):
    """out_TD = the columns x_TW of all ranks, by rank: D = ranks x W.

    `group` and `first_row` are as for `AllReduce`. On CUDA `out_TD` is rows of what
    `gather_buffer.output_rows` gives: every variant can write there, and those over peers' memory
    write nowhere else. `x_TW` may be this rank's own columns of `out_TD`.
    """

    def __call__(
        self,
        x_TW: Tensor,
        out_TD: Tensor,
        group: Any,  # noqa: ANN401
        num_sms: int,
        first_row: int = 0,
    ) -> None:
        """Launch on the current stream."""
        ...


Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One registered kernel."""

    kind: OpKind
    name: str
    device_type: str
    """`cuda` or `cpu`."""
    kernel: Kernel


_VARIANTS: dict[tuple[OpKind, str, str], Variant] = {}


def register(kind: OpKind, name: str, device_type: str) -> Callable[[Kernel], Kernel]:
    """Decorator: make a kernel known as variant `name` of `kind` on one device type."""

    def add(kernel: Kernel) -> Kernel:
        _VARIANTS[kind, name, device_type] = Variant(
            kind=kind, name=name, device_type=device_type, kernel=kernel
        )
        return kernel

    return add


def variants(kind: OpKind, device_type: str) -> tuple[str, ...]:
    """Names of the variants of a kind, in the order they were registered."""
    return tuple(
        variant.name
        for variant in _VARIANTS.values()
        if (variant.kind, variant.device_type) == (kind, device_type)
    )


def kernel(kind: OpKind, name: str, device_type: str) -> Kernel:
    """The kernel of a variant; on a CPU every variant is the torch one of its kind.

    Raises:
        ValueError: no such variant on this device; the message lists the known ones.
    """
    found = _VARIANTS.get((kind, "torch" if device_type == "cpu" else name, device_type))
    if found is None:
        known = ", ".join(variants(kind, device_type)) or "none"
        raise ValueError(f"no variant {name!r} of {kind} on {device_type}; known: {known}")
    return found.kernel
