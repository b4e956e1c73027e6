"""FlashInfer's paged attention as variants, when the library is there: extra `flashinfer`.

`flashinfer` decodes with the tensor-core (FA2) kernels, `flashinfer_fa3` and `flashinfer_fa2`
prefill. FlashInfer plans on the host before it runs, which cannot be captured into a CUDA graph:
the first call for some rows on some share plans (and waits for its stream), later ones only launch.
A plan belongs to its rows, holds its own workspace, and is freed with them; rows and their tensors
must not change meanwhile. Run eagerly once before capture, as `Executor.capture` does.
So an engine on a GPU, whose lengths change with every step, replaces these variants
(`host_planned`). For graphs that serve any lengths there would have to be: wrappers made with
`use_cuda_graph` over buffers of fixed size, one for each row range and share of a schedule; a plan
made from the step's host lengths by `StaticBatch.fill`, before its replay; two integer workspaces
in turn, since the step before may still read the last plan; grids that no length changes (FA2), and
`deal_to_share` within that plan (FA3).

FlashInfer sizes its plans for all SMs of the device. Here they are for the share: FA2 is told to
leave CTAs out, FA3's items are dealt again (`flashinfer_plan`). Both reach behind the wrappers, so
the version is pinned.

Shape legend: `registry`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .flashinfer_plan import (
    PagedBatch,
    deal_to_share,
    decode_batch,
    fa3_tile_rows,
    prefill_batch,
)
from .registry import DecodeRows, HeadShape, PrefillRows, register

FLASHINFER_VERSION = "0.6.14"
_INSTALL = "pip install 'nanoflow-tune[flashinfer]'"

Name = Literal["flashinfer", "flashinfer_fa2", "flashinfer_fa3"]


def why_missing() -> str:
    """Why the FlashInfer variants are not registered, with the remedy; empty when they are."""
    absent = [name for name in ("flashinfer", "tvm_ffi") if importlib.util.find_spec(name) is None]
    if absent:
        return f"FlashInfer variants need {' and '.join(absent)}, not installed: {_INSTALL}"
    version = importlib.metadata.version("flashinfer-python")
    if version != FLASHINFER_VERSION:
        return (
            f"FlashInfer variants are written for {FLASHINFER_VERSION}, found {version}: {_INSTALL}"
        )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    name: Name
    num_sms: int
    heads: HeadShape
    page_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A wrapper whose plan is made."""

    wrapper: Any
    row_slice: slice | None
    row_ids_R: Tensor
    """int64 on the device, for rows that are not consecutive."""
    tensors: tuple[weakref.ref[Tensor], ...]
    """The metadata that was planned for."""

    def run(
        self, qkv_TC: Tensor, k_pages: Tensor, v_pages: Tensor, out_TQ: Tensor, heads: HeadShape
    ) -> None:
        """Launch; consecutive rows are read and written where they are, others through copies."""
        q_TQ = qkv_TC[:, : heads.qo_size]
        if self.row_slice is not None:
            q_RQ, out_RQ = q_TQ[self.row_slice], out_TQ[self.row_slice]
        else:
            q_RQ = q_TQ.index_select(0, self.row_ids_R)
            out_RQ = torch.empty_like(q_RQ)
        split = (heads.num_qo_heads, heads.head_dim)
        # Programmatic dependent launch is off: it would reach over the executor's events.
        self.wrapper.run(
            q_RQ.unflatten(1, split),
            (k_pages, v_pages),
            out=out_RQ.unflatten(1, split),
            enable_pdl=False,
        )
        if self.row_slice is None:
            out_TQ.index_copy_(0, self.row_ids_R, out_RQ)


_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the tensor of lengths of some rows: their plans by key."""


def _planned(rows: DecodeRows | PrefillRows, key: _Key, device: torch.device) -> _Planned:
    if isinstance(rows, DecodeRows):
        tensors = (rows.kv_lens_R, rows.row_ids_R, rows.page_table_RP)
    else:
        tensors = (rows.num_rows_S, rows.row_starts_S, rows.position_starts_S, rows.page_table_SP)
    if tensors[0] not in _PLANS:
        _PLANS[tensors[0]] = {}
    plans: dict[_Key, _Planned] = _PLANS[tensors[0]]
    known = plans.get(key)
    if known is not None and all(
        ref() is tensor for ref, tensor in zip(known.tensors, tensors, strict=True)
    ):
        return known
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{key.name} plans on the host, which a CUDA graph cannot capture: run the same rows "
            "once eagerly on this share before capture"
        )
    if isinstance(rows, DecodeRows):
        batch = decode_batch(rows, key.page_size)
    else:
        batch = prefill_batch(rows, key.page_size)
    planned = _Planned(
        wrapper=_plan(batch, key, device),
        row_slice=batch.row_slice,
        row_ids_R=torch.tensor(batch.row_ids, dtype=torch.int64, device=device),
        tensors=tuple(weakref.ref(tensor) for tensor in tensors),
    )
    # The plan may run on another stream than this one.
    torch.cuda.current_stream().synchronize()
    plans[key] = planned
    return planned


def _plan(batch: PagedBatch, key: _Key, device: torch.device) -> Any:  # noqa: ANN401
    from flashinfer import (  # imports for two seconds, so only where it is used
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
    )

    device_sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    heads = key.heads
    workspace = torch.empty(_workspace_bytes(key, device_sms), dtype=torch.uint8, device=device)
    types = {"q_data_type": key.dtype, "kv_data_type": key.dtype, "o_data_type": key.dtype}
    shape = (heads.num_qo_heads, heads.num_kv_heads, heads.head_dim, key.page_size)
    pages = (batch.page_ends_S1, batch.page_ids_P, batch.last_page_lens_S)
    if key.name == "flashinfer":
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *shape, **types)
    else:
        backend = key.name.removeprefix("flashinfer_")
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
        wrapper.plan(batch.row_ends_S1, *pages, *shape, causal=True, **types)
    if key.num_sms < device_sms:
        if key.name == "flashinfer_fa3":
            _plan_fa3_for_share(wrapper, key, device_sms)
        else:
            _plan_fa2_for_share(wrapper, batch, key, device_sms)
    return wrapper


def _workspace_bytes(key: _Key, device_sms: int) -> int:
    """Room for the partial sums (fp32 rows and their scale) of keys split over two CTAs per SM."""
    heads = key.heads
    tile_rows = 128
    if key.name == "flashinfer_fa3":
        return 1 << 20  # FA3 splits no keys
    if key.name == "flashinfer":
        group = heads.num_qo_heads // heads.num_kv_heads
        tile_rows = 16 if group <= 16 else 64 if group <= 64 else 128
    tiles = max(1, 2 * device_sms // heads.num_kv_heads)
    return heads.num_qo_heads * tiles * tile_rows * (heads.head_dim + 1) * 4 + (1 << 20)


def _plan_fa2_for_share(wrapper: Any, batch: PagedBatch, key: _Key, device_sms: int) -> None:  # noqa: ANN401
    """Plan again with the CTAs of the other SMs left out.

    The wrappers pass 0 for the number of CTAs that a second kernel holds (their POD attention), the
    module behind them takes any.
    """
    heads = key.heads
    wrapper._plan_info = wrapper._cached_module.plan(
        wrapper._float_workspace_buffer,
        wrapper._int_workspace_buffer,
        wrapper._pin_memory_int_workspace_buffer,
        batch.row_ends_S1,
        batch.page_ends_S1,
        batch.kv_lens_S,
        len(batch.row_ids),
        batch.num_requests,
        heads.num_qo_heads,
        heads.num_kv_heads,
        key.page_size,
        False,  # CUDA-graph mode: for plans that change under one graph
        heads.head_dim,
        heads.head_dim,
        key.name != "flashinfer",  # causal
        -1,  # no sliding window
        -1,  # no fixed split size
        False,  # splits along the keys are allowed
        2 * (device_sms - key.num_sms),
    )


def _plan_fa3_for_share(wrapper: Any, key: _Key, device_sms: int) -> None:  # noqa: ANN401
    torch.cuda.current_stream().synchronize()  # the planner's copy reads the buffer changed here
    host = wrapper._pin_memory_int_workspace_buffer
    used = deal_to_share(
        host,
        [int(value) for value in wrapper._plan_info],
        device_sms,
        key.num_sms,
        fa3_tile_rows(key.heads.head_dim),
    )
    wrapper._int_workspace_buffer[:used].copy_(host[:used])


def _attention(
    name: Name,
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows | PrefillRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    if not out_TQ.is_contiguous():
        raise ValueError(
            f"{name} writes contiguous rows, got out_TQ with strides {out_TQ.stride()}: give it a "
            "buffer of its own"
        )
    key = _Key(
        name=name,
        num_sms=num_sms,
        heads=heads,
        page_size=k_pages_PGBH.shape[2],
        dtype=qkv_TC.dtype,
    )
    planned = _planned(rows, key, qkv_TC.device)
    planned.run(qkv_TC, k_pages_PGBH, v_pages_PGBH, out_TQ, heads)


def decode_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Batch decode with tensor cores.

    Raises:
        ValueError: the rows of `out_TQ` are not contiguous.
        RuntimeError: first call for these rows and share, inside CUDA-graph capture.
    """
    _attention("flashinfer", qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads, num_sms)


def prefill_attention_fa2(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: PrefillRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Chunked prefill by the FA2 kernels; splits keys where rows leave SMs idle.

    Raises:
        ValueError: the rows of `out_TQ` are not contiguous.
        RuntimeError: first call for these rows and share, inside CUDA-graph capture.
    """
    _attention("flashinfer_fa2", qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads, num_sms)


def prefill_attention_fa3(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: PrefillRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Chunked prefill by the Hopper (FA3) kernels, one persistent CTA per SM of the share.

    Raises:
        ValueError: the rows of `out_TQ` are not contiguous.
        RuntimeError: first call for these rows and share, inside CUDA-graph capture.
    """
    _attention("flashinfer_fa3", qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads, num_sms)


_missing = why_missing()
if _missing:
    logging.getLogger(__name__).info("%s", _missing)
else:
    register("decode_attention", "flashinfer", "cuda")(decode_attention)
    register("prefill_attention", "flashinfer_fa2", "cuda")(prefill_attention_fa2)
    register("prefill_attention", "flashinfer_fa3", "cuda")(prefill_attention_fa3)
