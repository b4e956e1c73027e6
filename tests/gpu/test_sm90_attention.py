"""Decode attention for Hopper on a device: float64 references, poison, shares, repeats, graphs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape  # noqa: E402

from .kernel_reference import (  # noqa: E402
    INTERPRETED,
    PAGE,
    assert_rows,
    decode_operands,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="CUDA C++, not Triton"),
]
SHARES = [8, 16, 32, 132]


@pytest.fixture(scope="module")
def streams():
    """A stream for each share, on its own partition."""
    from nanoflow_tune.runtime.partition_layout import GroupRange
    from nanoflow_tune.runtime.sm_partition import SmPartitions

    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    partitions = SmPartitions(num_sms, 8)
    yield {
        share: partitions.whole_stream("memory")
        if share >= num_sms
        else partitions.stream_of(GroupRange(start=0, end=share // 8))
        for share in SHARES
    }
    partitions.close()


def mixed_lengths(count, longest, seed=0):
    draw = random.Random(seed)
    return [1, longest, *(draw.randint(1, longest) for _ in range(count - 2))]


def poison_absent_keys(operands):
    """NaN wherever no request has a key: tails of last pages, pages of nobody."""
    _, k_pages, v_pages, meta, _, _ = operands
    is_present = torch.zeros(k_pages.shape[0], PAGE, dtype=torch.bool)
    for pages, kv_len in zip(meta.page_table_RP.tolist(), meta.kv_lens_R.tolist(), strict=True):
        for first in range(0, kv_len, PAGE):
            is_present[pages[first // PAGE], : kv_len - first] = True
    absent = ~is_present.to(k_pages.device)[:, None, :, None]
    for pool in (k_pages, v_pages):
        pool.masked_fill_(absent, float("nan"))


def poisoned_operands(kv_lens, heads):
    operands, rows, reference = decode_operands(kv_lens, heads)
    poison_absent_keys(operands)
    return operands, rows, reference


def run(operands, num_sms, stream=None, tile=None):
    from nanoflow_tune.runtime.kernels.sm90_attention import DECODE_TILE, launch_decode

    stream = stream or torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch_decode(tile or DECODE_TILE, *operands, num_sms)
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "kv_lens",
    [
        [1],
        [16],
        [5, 16, 17, 31, 32, 33],
        [1] * 300,
        [2000],
        [1, 16, 17, 100, 1000, 4097],
    ],
    ids=lambda lens: f"{len(lens)}x{max(lens)}",
)
@pytest.mark.parametrize("num_sms", [4, 132])
def test_matches_float64_and_touches_only_its_rows(heads, kv_lens, num_sms):
    operands, rows, reference = poisoned_operands(kv_lens, heads)
    run(operands, num_sms)
    assert_rows(operands[4], rows, reference)


@pytest.mark.parametrize("group", [2, 3, 7, 11, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_takes_any_group_up_to_16(group, head_dim):
    heads = HeadShape(num_qo_heads=3 * group, num_kv_heads=3, head_dim=head_dim)
    operands, rows, reference = poisoned_operands([700, 1, 33, 250], heads)
    run(operands, 8)
    assert_rows(operands[4], rows, reference)


@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("heads", [HeadShape(num_qo_heads=32, num_kv_heads=8, head_dim=128)])
def test_mixed_lengths_on_partitions_and_repeats_give_equal_bits(streams, heads, num_sms):
    operands, rows, reference = poisoned_operands(mixed_lengths(24, 8192), heads)
    run(operands, num_sms, streams[num_sms])
    assert_rows(operands[4], rows, reference)
    first = operands[4].clone()
    for _ in range(20):
        operands[4].fill_(float("nan"))
        run(operands, num_sms, streams[num_sms])
        assert torch.equal(operands[4][rows], first[rows])


def test_scores_that_grow_along_the_keys_are_rescaled():
    heads = HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=128)
    operands, rows, reference = decode_operands([900, 40], heads)
    qkv, k_pages, v_pages, meta, out, _ = operands
    loud = torch.linspace(1, 30, 900, device="cuda")
    k_dense = []
    for pages, kv_len in zip(meta.page_table_RP.tolist(), meta.kv_lens_R.tolist(), strict=True):
        for key in range(kv_len):
            k_pages[pages[key // PAGE], :, key % PAGE] *= loud[key]
        gather = [
            pool[pages[: -(-kv_len // PAGE)]].transpose(1, 2).reshape(-1, 2, 128)[:kv_len]
            for pool in (k_pages, v_pages)
        ]
        k_dense.append(gather)
    from .kernel_reference import attend

    queries = qkv[rows, : heads.qo_size].view(-1, 8, 128)
    reference = torch.stack(
        [attend(q, k, v).flatten() for q, (k, v) in zip(queries, k_dense, strict=True)]
    )
    run(operands, 4)
    assert_rows(out, rows, reference)


@pytest.mark.parametrize("num_rows", [700, 4096])
def test_many_short_rows(num_rows):
    heads = HeadShape(num_qo_heads=4, num_kv_heads=1, head_dim=64)
    lengths = [1 + index * 7 % 70 for index in range(num_rows)]
    operands, rows, reference = poisoned_operands(lengths, heads)
    run(operands, 132)
    assert_rows(operands[4], rows, reference)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "change",
    [
        {"num_warps": 4, "ring_bytes": 48 << 10},
        {"num_warps": 6, "ring_bytes": 32 << 10, "is_evict_first": False},
        {"min_pages": 2, "min_fragment_pages": 1},
    ],
    ids=str,
)
def test_other_tiles_agree(head_dim, change):
    from nanoflow_tune.runtime.kernels.sm90_attention import DECODE_TILE

    heads = HeadShape(num_qo_heads=16, num_kv_heads=2, head_dim=head_dim)
    operands, rows, reference = poisoned_operands([3000, 1, 500, 16, 1023], heads)
    run(operands, 24, tile=replace(DECODE_TILE, **change))
    assert_rows(operands[4], rows, reference)


def test_more_kv_heads_than_warps_share_lists():
    from nanoflow_tune.runtime.kernels.sm90_attention import DECODE_TILE

    heads = HeadShape(num_qo_heads=24, num_kv_heads=12, head_dim=64)
    operands, rows, reference = poisoned_operands([300, 1, 16, 77], heads)
    run(operands, 1, tile=replace(DECODE_TILE, num_warps=8))
    assert_rows(operands[4], rows, reference)


def test_a_graph_follows_lengths_that_change_between_replays(streams):
    heads = HeadShape(num_qo_heads=32, num_kv_heads=4, head_dim=128)
    operands, rows, reference = poisoned_operands(mixed_lengths(40, 3000), heads)
    meta, out = operands[3], operands[4]
    stream = streams[16]
    run(operands, 16, stream)  # allocates the workspace outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(operands, 16, stream)
    whole = meta.kv_lens_R.clone()
    shorter = (whole + 1) // 2
    expected = {}
    for name, lengths in (("whole", whole), ("shorter", shorter)):
        meta.kv_lens_R.copy_(lengths)
        out.fill_(float("nan"))
        run(operands, 16, stream)
        expected[name] = out[rows].clone()
    for name, lengths in (("shorter", shorter), ("whole", whole), ("shorter", shorter)):
        meta.kv_lens_R.copy_(lengths)
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[rows], expected[name])
    out.fill_(float("nan"))
    out[rows] = expected["whole"]
    assert_rows(out, rows, reference)


def test_a_first_call_inside_a_capture_is_right():
    heads = HeadShape(num_qo_heads=8, num_kv_heads=1, head_dim=128)
    operands, rows, reference = poisoned_operands([5000, 300], heads)
    stream = torch.cuda.Stream()
    run(operands, 131)  # loads the kernel
    operands[4].fill_(float("nan"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(operands, 131, stream)
        run(operands, 131, stream)
    for _ in range(2):
        operands[4].fill_(float("nan"))
        graph.replay()
        assert_rows(operands[4], rows, reference)


def test_no_rows_write_nothing(heads):
    operands, _, _ = decode_operands([5], heads)
    meta = operands[3]
    none = DecodeRows(
        row_ids_R=meta.row_ids_R[:0],
        kv_lens_R=meta.kv_lens_R[:0],
        page_table_RP=meta.page_table_RP[:0],
        max_kv_len=0,
    )
    run([*operands[:3], none, *operands[4:]], 8)
    assert bool(operands[4].isnan().all())
