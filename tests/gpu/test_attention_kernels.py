"""Attention kernels against float64, every variant, poisoned outputs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape, PrefillRows  # noqa: E402

from .kernel_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    INTERPRETED,
    MARKS,
    assert_rows,
    attend,
    decode_operands,
    paged_cache,
    randn,
    relative_error,
    tolerance,
)

pytestmark = MARKS


def test_decode_attention_matches_float64_and_touches_only_its_rows(heads):
    from nanoflow_tune.runtime.kernels.triton_attention import decode_attention

    kv_lens = [1, 17, 64, 100] if INTERPRETED else [1, 16, 17, 100, 1000, 4097]
    operands, rows, reference = decode_operands(kv_lens, heads)
    decode_attention(*operands, 4)
    assert_rows(operands[4], rows, reference)


def scaled(length):
    """Lengths are an eighth under the interpreter."""
    return length if INTERPRETED else 8 * length


def split_tile(split_keys=64):
    from nanoflow_tune.runtime.kernels.triton_decode_split import SPLIT_TILE

    return replace(SPLIT_TILE, split_keys=scaled(split_keys))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "kv_lens",
    [
        [1, 17, 64, 65, 128, 300],
        [300],
        [64, 63, 1],
        [64] * 3,
        [128, 192],
    ],
    ids=str,
)
def test_split_decode_matches_float64_and_touches_only_its_rows(heads, kv_lens):
    from nanoflow_tune.runtime.kernels.triton_decode_split import launch_split_decode

    operands, rows, reference = decode_operands([scaled(length) for length in kv_lens], heads)
    launch_split_decode(split_tile(), *operands, 1)
    assert_rows(operands[4], rows, reference)


@pytest.mark.parametrize("group", [3, 7, 16])
def test_split_decode_takes_any_group_size(group):
    from nanoflow_tune.runtime.kernels.triton_decode_split import launch_split_decode

    heads = HeadShape(num_qo_heads=group, num_kv_heads=1, head_dim=64)
    operands, rows, reference = decode_operands([scaled(200), 5, scaled(70)], heads)
    launch_split_decode(split_tile(), *operands, 2)
    assert_rows(operands[4], rows, reference)


@pytest.mark.usefixtures("poisoned_memory")
def test_split_decode_reads_8192_keys_and_one_by_the_registered_variant():
    from nanoflow_tune.runtime.kernels.triton_decode_split import split_decode_attention

    heads = HeadShape(num_qo_heads=4, num_kv_heads=1, head_dim=64)
    operands, rows, reference = decode_operands([1, 8192, 1024, 1025, 2500], heads)
    split_decode_attention(*operands, 2)
    assert_rows(operands[4], rows, reference)


def test_split_decode_gives_the_same_bits_on_any_share_and_beside_other_rows(heads):
    from nanoflow_tune.runtime.kernels.triton_decode_split import launch_split_decode

    operands, rows, _ = decode_operands([scaled(300), 5, scaled(130), scaled(64)], heads)
    outs = []
    for num_sms, count, bound in (
        (1, 4, 300),
        (1, 4, 300),
        (13, 4, 300),
        (132, 1, 300),
        (4, 4, 999),
    ):
        meta = operands[3]
        some = DecodeRows(
            row_ids_R=meta.row_ids_R[:count],
            kv_lens_R=meta.kv_lens_R[:count],
            page_table_RP=meta.page_table_RP[:count],
            max_kv_len=scaled(bound),
        )
        out = torch.full_like(operands[4], float("nan"))
        launch_split_decode(split_tile(), *operands[:3], some, out, heads, num_sms)
        outs.append(out)
    for out in (outs[1], outs[2], outs[4]):
        assert torch.equal(out[rows], outs[0][rows])
    assert torch.equal(outs[3][rows[0]], outs[0][rows[0]])


def test_split_decode_of_no_rows_launches_nothing(heads):
    from nanoflow_tune.runtime.kernels.triton_decode_split import split_decode_attention

    operands, _, _ = decode_operands([5], heads)
    meta = operands[3]
    none = DecodeRows(
        row_ids_R=meta.row_ids_R[:0],
        kv_lens_R=meta.kv_lens_R[:0],
        page_table_RP=meta.page_table_RP[:0],
        max_kv_len=0,
    )
    split_decode_attention(*operands[:3], none, *operands[4:], 4)
    assert bool(operands[4].isnan().all())


def test_prefill_attention_is_causal_over_chunks(heads):
    from nanoflow_tune.runtime.kernels.triton_attention import prefill_attention

    segments = [(0, 5), (9, 30), (3, 140)] if INTERPRETED else [(0, 5), (300, 300), (64, 129)]
    kv_lens = [start + count for start, count in segments]
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    total = sum(count for _, count in segments) + 4
    qkv = randn(total, heads.qo_size + 2 * heads.kv_size, seed=6)
    out = torch.full((total, heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    starts, row = [], 2
    for _, count in segments:
        starts.append(row)
        row += count

    def column(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    meta = PrefillRows(
        row_starts_S=column(starts),
        num_rows_S=column([count for _, count in segments]),
        position_starts_S=column([start for start, _ in segments]),
        page_table_SP=table,
        segment_rows=tuple(count for _, count in segments),
        max_kv_len=max(kv_lens),
    )
    prefill_attention(qkv, k_pages, v_pages, meta, out, heads, 4)
    for (start, count), first, (k, v) in zip(segments, starts, dense, strict=True):
        expected = torch.stack(
            [
                attend(
                    qkv[first + i, : heads.qo_size].view(heads.num_qo_heads, heads.head_dim),
                    k[: start + i + 1],
                    v[: start + i + 1],
                ).flatten()
                for i in range(count)
            ]
        )
        assert relative_error(out[first : first + count], expected) < tolerance()
    assert bool(out[:2].isnan().all())
    assert bool(out[row:].isnan().all())
