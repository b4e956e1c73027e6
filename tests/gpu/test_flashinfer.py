"""FlashInfer variants against float64 on a GPU: shares, scattered rows, CUDA graphs.

Head dimension 128 alone: other ones make FlashInfer compile for minutes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("flashinfer")

from nanoflow_tune.runtime.kernels.registry import HeadShape, PrefillRows  # noqa: E402

from .kernel_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    INTERPRETED,
    assert_rows,
    decode_operands,
    paged_cache,
    randn,
    relative_error,
    tolerance,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]

SHARES = (8, 32, 100, 132)
PREFILL = ("flashinfer_fa3", "flashinfer_fa2")
# (first position, rows): a prompt, one row, a chunk that ends a long one, a tile and one row.
SEGMENTS = ((0, 300), (700, 1), (1000, 200), (0, 129))


@pytest.fixture(params=[1, 4, 8], ids="g{}".format)
def heads128(request):
    return HeadShape(num_qo_heads=4 * request.param, num_kv_heads=4, head_dim=128)


def variant(kind, name):
    from nanoflow_tune.runtime.kernels import flashinfer_attention, registry

    assert not flashinfer_attention.why_missing()
    return registry.kernel(kind, name, "cuda")


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("num_sms", SHARES)
def test_decode_matches_float64_and_touches_only_its_rows(heads128, num_sms):
    decode = variant("decode_attention", "flashinfer")
    operands, rows, reference = decode_operands([1, 16, 17, 100, 1000, 4097], heads128)
    decode(*operands, num_sms)
    assert_rows(operands[4], rows, reference)


def test_decode_of_consecutive_rows_works_in_place(heads128):
    decode = variant("decode_attention", "flashinfer")
    operands, rows, reference = decode_operands([40, 4097, 1, 16], heads128)
    qkv, k_pages, v_pages, meta, out, heads = operands
    qkv[2:6] = qkv[rows].clone()
    meta = replace(meta, row_ids_R=ints(range(2, 6)))
    decode(qkv, k_pages, v_pages, meta, out, heads, 132)
    assert_rows(out, [2, 3, 4, 5], reference)


def prefill_operands(heads, gap):
    """Arguments of a prefill kernel but for the share; segments `gap` rows apart; reference."""
    kv_lens = [start + count for start, count in SEGMENTS]
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    starts, row = [], 2
    for _, count in SEGMENTS:
        starts.append(row)
        row += count + gap
    qkv = randn(row + 2, heads.qo_size + 2 * heads.kv_size, seed=6)
    out = torch.full((row + 2, heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    meta = PrefillRows(
        row_starts_S=ints(starts),
        num_rows_S=ints([count for _, count in SEGMENTS]),
        position_starts_S=ints([start for start, _ in SEGMENTS]),
        page_table_SP=table,
        segment_rows=tuple(count for _, count in SEGMENTS),
        max_kv_len=max(kv_lens),
    )
    rows, expected = [], []
    for (position, count), first, (k, v) in zip(SEGMENTS, starts, dense, strict=True):
        group = heads.num_qo_heads // heads.num_kv_heads
        q = qkv[first : first + count, : heads.qo_size].double()
        q = q.view(count, heads.num_qo_heads, heads.head_dim)
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("rnh,tnh->nrt", q, k) / heads.head_dim**0.5
        last = position + torch.arange(count, device=DEVICE)[:, None]
        hidden = torch.arange(k.shape[0], device=DEVICE)[None, :] > last
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        expected.append(torch.einsum("nrt,tnh->rnh", weights, v).flatten(1))
        rows.extend(range(first, first + count))
    return (qkv, k_pages, v_pages, meta, out, heads), rows, torch.cat(expected)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill_is_causal_over_chunks_and_touches_only_its_rows(heads128, name, num_sms, gap):
    operands, rows, expected = prefill_operands(heads128, gap)
    variant("prefill_attention", name)(*operands, num_sms)
    out = operands[4]
    assert relative_error(out[rows], expected) < tolerance()
    others = sorted(set(range(out.shape[0])) - set(rows))
    assert bool(out[others].isnan().all())


@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("name", ["flashinfer", *PREFILL])
def test_a_captured_run_gives_the_bits_of_the_eager_one(name, num_sms):
    heads = HeadShape(num_qo_heads=32, num_kv_heads=8, head_dim=128)
    if name == "flashinfer":
        operands, rows, _ = decode_operands([1, 1024, 5000, 8192], heads)
        call = variant("decode_attention", name)
    else:
        operands, rows, _ = prefill_operands(heads, gap=0)
        call = variant("prefill_attention", name)
    out = operands[4]
    call(*operands, num_sms)
    eager = out[rows].clone()
    out.fill_(float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*operands, num_sms)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[rows], eager)


def test_a_first_call_inside_capture_is_refused():
    heads = HeadShape(num_qo_heads=8, num_kv_heads=8, head_dim=128)
    decode = variant("decode_attention", "flashinfer")
    warm, _, _ = decode_operands([5], heads)
    decode(*warm, 132)
    operands, _, _ = decode_operands([5, 6], heads)
    with (
        pytest.raises(RuntimeError, match="once eagerly"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        decode(*operands, 132)


def test_plans_are_freed_with_their_rows():
    from nanoflow_tune.runtime.kernels import flashinfer_attention

    heads = HeadShape(num_qo_heads=8, num_kv_heads=8, head_dim=128)
    before = len(flashinfer_attention._PLANS)
    operands, _, _ = decode_operands([5, 6], heads)
    variant("decode_attention", "flashinfer")(*operands, 132)
    assert len(flashinfer_attention._PLANS) == before + 1
    del operands
    assert len(flashinfer_attention._PLANS) == before


@pytest.mark.parametrize("name", ["flashinfer", *PREFILL])
def test_a_share_of_a_partition_gives_the_bits_of_the_whole_device(name):
    from nanoflow_tune.runtime.partition_layout import GroupRange
    from nanoflow_tune.runtime.sm_partition import SmPartitions

    heads = HeadShape(num_qo_heads=32, num_kv_heads=8, head_dim=128)
    if name == "flashinfer":
        operands, rows, _ = decode_operands([1, 1024, 5000, 8192], heads)
        call = variant("decode_attention", name)
    else:
        operands, rows, _ = prefill_operands(heads, gap=0)
        call = variant("prefill_attention", name)
    out = operands[4]
    call(*operands, 32)
    outside = out[rows].clone()
    out.fill_(float("nan"))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    view = SmPartitions(sms, 8).view({("memory", 32): GroupRange(start=0, end=4)})
    stream = view.stream("memory", 32)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*operands, 32)
    torch.cuda.synchronize()
    assert torch.equal(out[rows], outside)
