"""Attention kernels against float64, every variant, poisoned outputs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import DecodeRows, PrefillRows  # noqa: E402

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


def test_decode_rows_without_keys_are_not_written(heads):
    from nanoflow_tune.runtime.kernels.triton_attention import decode_attention

    operands, rows, reference = decode_operands([17, 40], heads)
    meta, out = operands[3:5]
    padded = DecodeRows(
        row_ids_R=torch.cat((meta.row_ids_R, torch.zeros_like(meta.row_ids_R))),
        kv_lens_R=torch.cat((meta.kv_lens_R, torch.zeros_like(meta.kv_lens_R))),
        page_table_RP=torch.cat((meta.page_table_RP, torch.zeros_like(meta.page_table_RP))),
        max_kv_len=meta.max_kv_len,
    )
    out[0] = 1.0  # the row that padding names
    decode_attention(*operands[:3], padded, *operands[4:], 4)
    assert bool((out[0] == 1.0).all())
    out[0] = float("nan")
    assert_rows(out, rows, reference)


@pytest.mark.parametrize("is_padded", [False, True])
def test_prefill_attention_is_causal_over_chunks(heads, is_padded):
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
    if is_padded:  # as a captured graph sees it: room for more segments, and more rows promised
        meta = PrefillRows(
            row_starts_S=column([*starts, 0, 0]),
            num_rows_S=column([*(count for _, count in segments), 0, 0]),
            position_starts_S=column([*(start for start, _ in segments), 0, 0]),
            page_table_SP=torch.cat((table, torch.zeros_like(table[:2]))),
            segment_rows=(total,) * (len(segments) + 2),
            max_kv_len=2 * max(kv_lens),
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
