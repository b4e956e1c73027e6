"""The FlashInfer variants over a stand-in library: what they plan, how often, and on which rows."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from nanoflow_tune.runtime.kernels import flashinfer_attention, torch_ops
from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape, PrefillRows

HEADS = HeadShape(num_qo_heads=4, num_kv_heads=2, head_dim=8)
PAGE, NUM_SMS = 4, 132


class Wrapper:
    """Takes plans like FlashInfer's paged wrappers and computes what they promise, slowly."""

    made: list[Wrapper]

    def __init__(self, workspace, layout, backend="", use_tensor_cores=False):
        assert layout == "HND"
        assert use_tensor_cores or backend in ("fa2", "fa3")
        self._float_workspace_buffer = workspace
        self._int_workspace_buffer = torch.zeros(1 << 12, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = torch.zeros(1 << 12, dtype=torch.uint8)
        self._cached_module = SimpleNamespace(plan=lambda *args: args)
        self._plan_info = ()
        Wrapper.made.append(self)

    def run(self, q, pages, out, enable_pdl):
        assert not enable_pdl
        k_pages, v_pages = pages
        for request, kv_len in enumerate(self.kv_lens):
            a, b = self.row_ends[request : request + 2]
            mine = self.page_ids[self.page_ends[request] : self.page_ends[request + 1]]
            k, v = (
                x[mine].transpose(1, 2).flatten(0, 1)[:kv_len].repeat_interleave(2, dim=1)
                for x in (k_pages, v_pages)
            )
            scores = torch.einsum("rnh,tnh->nrt", q[a:b], k) / q.shape[2] ** 0.5
            last = kv_len - (b - a) + torch.arange(b - a)[:, None]
            scores = scores.masked_fill(torch.arange(kv_len) > last, float("-inf"))
            out[a:b] = torch.einsum("nrt,tnh->rnh", scores.softmax(-1), v)

    def plan_pages(self, row_ends, page_ends, page_ids, last_page_lens, *heads):
        assert heads == (HEADS.num_qo_heads, HEADS.num_kv_heads, HEADS.head_dim, PAGE)
        self.row_ends, self.page_ends = row_ends.tolist(), page_ends.tolist()
        self.page_ids = page_ids.long()
        full = (page_ends[1:] - page_ends[:-1] - 1) * PAGE
        self.kv_lens = (full + last_page_lens).tolist()


class DecodeWrapper(Wrapper):
    def plan(self, *args, q_data_type, kv_data_type, o_data_type):
        self.plan_pages(torch.arange(len(args[2]) + 1), *args)


class PrefillWrapper(Wrapper):
    def plan(self, *args, causal, q_data_type, kv_data_type, o_data_type):
        assert causal
        self.plan_pages(*args)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    Wrapper.made = []
    monkeypatch.setitem(
        sys.modules,
        "flashinfer",
        SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper,
            BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper,
        ),
    )
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = SimpleNamespace(multi_processor_count=NUM_SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def buffers():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(12, HEADS.qo_size + 2 * HEADS.kv_size, generator=generator)
    pages = torch.randn(2, 9, HEADS.num_kv_heads, PAGE, HEADS.head_dim, generator=generator)
    return qkv, pages[0], pages[1]


def decode_rows(row_ids):
    return DecodeRows(
        row_ids_R=ints(row_ids),
        kv_lens_R=ints([1, 9, 4]),
        page_table_RP=ints([[7, 0, 0], [2, 8, 1], [5, 0, 0]]),
        max_kv_len=9,
    )


def prefill_rows(starts):
    return PrefillRows(
        row_starts_S=ints(starts),
        num_rows_S=ints([3, 5]),
        position_starts_S=ints([6, 0]),
        page_table_SP=ints([[2, 8, 1], [5, 4, 0]]),
        segment_rows=(3, 5),
        max_kv_len=9,
    )


def outs(kernel, reference, buffers, rows, num_sms):
    got, expected = (torch.full((12, HEADS.qo_size), -7.0) for _ in range(2))
    kernel(*buffers, rows, got, HEADS, num_sms)
    reference(*buffers, rows, expected, HEADS, num_sms)
    return got, expected


@pytest.mark.parametrize("row_ids", [[2, 3, 4], [9, 0, 5]], ids=str)
def test_decode_reads_and_writes_its_rows_alone(buffers, row_ids):
    kernel = flashinfer_attention.decode_attention
    got, expected = outs(kernel, torch_ops.decode_attention, buffers, decode_rows(row_ids), 132)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("starts", [[1, 4], [7, 0]], ids=str)
def test_prefill_is_causal_within_its_segments(buffers, starts):
    kernel = flashinfer_attention.prefill_attention_fa3
    got, expected = outs(kernel, torch_ops.prefill_attention, buffers, prefill_rows(starts), 132)
    torch.testing.assert_close(got, expected)


def test_rows_are_planned_once_for_each_share_and_freed_with_them(buffers):
    rows, out = decode_rows([2, 3, 4]), torch.empty(12, HEADS.qo_size)
    for num_sms in (132, 132, 32, 132, 32):
        flashinfer_attention.decode_attention(*buffers, rows, out, HEADS, num_sms)
    assert len(Wrapper.made) == 2
    other = decode_rows([2, 3, 4])
    flashinfer_attention.decode_attention(*buffers, other, out, HEADS, 132)
    assert len(Wrapper.made) == 3
    plans = len(flashinfer_attention._PLANS)
    del rows, other
    assert len(flashinfer_attention._PLANS) == plans - 2


def test_fa2_plans_for_a_share_leave_the_other_sms_out(buffers):
    out = torch.empty(12, HEADS.qo_size)
    flashinfer_attention.decode_attention(*buffers, decode_rows([2, 3, 4]), out, HEADS, 32)
    flashinfer_attention.prefill_attention_fa2(*buffers, prefill_rows([1, 4]), out, HEADS, 24)
    decode, prefill = (wrapper._plan_info for wrapper in Wrapper.made)
    # The module's plan takes 19 arguments; rows, requests and causality are its 7th, 8th and 15th.
    assert (len(decode), decode[6:8], decode[14], decode[-1]) == (19, (3, 3), False, 200)
    assert (len(prefill), prefill[6:8], prefill[14], prefill[-1]) == (19, (8, 2), True, 216)


def test_a_first_call_inside_capture_is_refused(buffers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    out = torch.empty(12, HEADS.qo_size)
    with pytest.raises(RuntimeError, match="run the same rows once eagerly on this share"):
        flashinfer_attention.decode_attention(*buffers, decode_rows([0, 1, 2]), out, HEADS, 8)


def test_an_output_whose_rows_have_gaps_is_refused(buffers):
    out = torch.empty(12, 2 * HEADS.qo_size)[:, : HEADS.qo_size]
    with pytest.raises(ValueError, match="contiguous rows"):
        flashinfer_attention.decode_attention(*buffers, decode_rows([0, 1, 2]), out, HEADS, 8)
