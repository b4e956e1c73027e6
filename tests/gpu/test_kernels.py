"""Kernels against float64 references, every variant, poisoned outputs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import (  # noqa: E402
    DecodeRows,
    HeadShape,
    PrefillRows,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

PAGE = 16


def relative_error(out, reference):
    out, reference = out.double().cpu(), reference.double().cpu()
    return float((out - reference).norm() / reference.norm())


def tolerance():
    return 1e-3 if INTERPRETED else 1e-2


def randn(*shape, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=generator).to(DTYPE)


def paged_cache(kv_lens, heads, seed=1):
    """Random K and V in random pages; returns pages, page table and dense K, V per request."""
    pages_each = [-(-length // PAGE) for length in kv_lens]
    total = sum(pages_each) + 3
    shape = (total, heads.num_kv_heads, PAGE, heads.head_dim)
    k_pages, v_pages = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.zeros(len(kv_lens), max(pages_each), dtype=torch.int32)
    dense = []
    for request, count in enumerate(pages_each):
        mine = [order.pop() for _ in range(count)]
        table[request, :count] = torch.tensor(mine, dtype=torch.int32)
        gather = [
            pages[mine].transpose(1, 2).reshape(-1, heads.num_kv_heads, heads.head_dim)
            for pages in (k_pages, v_pages)
        ]
        dense.append(tuple(x[: kv_lens[request]] for x in gather))
    return k_pages, v_pages, table.to(DEVICE), dense


def attend(q_NH, k_TKH, v_TKH):
    """float64 attention of one row: q [heads, dim]."""
    group = q_NH.shape[0] // k_TKH.shape[1]
    k = k_TKH.double().repeat_interleave(group, dim=1)
    v = v_TKH.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("nh,tnh->nt", q_NH.double(), k) / q_NH.shape[1] ** 0.5
    return torch.einsum("nt,tnh->nh", scores.softmax(dim=-1), v)


@pytest.fixture(params=[(d, g) for d in (64, 128) for g in (1, 4, 8)], ids="d{0[0]}-g{0[1]}".format)
def heads(request):
    head_dim, group = request.param
    return HeadShape(num_qo_heads=2 * group, num_kv_heads=2, head_dim=head_dim)


@pytest.fixture
def poisoned_memory():
    """New tensors are NaN or the largest integer: a kernel that reads what it never wrote shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def decode_operands(kv_lens, heads):
    """Arguments of a decode kernel but for the SM share, its out poisoned, and its reference."""
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    rows = [2 * index + 1 for index in range(len(kv_lens))]
    qkv = randn(2 * len(kv_lens) + 2, heads.qo_size + 2 * heads.kv_size, seed=5)
    out = torch.full((qkv.shape[0], heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    meta = DecodeRows(
        row_ids_R=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        kv_lens_R=torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE),
        page_table_RP=table,
        max_kv_len=max(kv_lens),
    )
    q = qkv[rows, : heads.qo_size].view(-1, heads.num_qo_heads, heads.head_dim)
    reference = [attend(one, k, v).flatten() for one, (k, v) in zip(q, dense, strict=True)]
    return (qkv, k_pages, v_pages, meta, out, heads), rows, torch.stack(reference)


def assert_rows(out, rows, reference):
    """Each row is right, and no other row was written."""
    for row, expected in zip(rows, reference, strict=True):
        assert relative_error(out[row], expected) < tolerance()
    others = [row for row in range(out.shape[0]) if row not in rows]
    assert bool(out[others].isnan().all())


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


def gemm_variants():
    from nanoflow_tune.runtime.kernels.triton_gemm import TILES
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    names = [*(tile.name for tile in TILES), *VARIANTS]
    return names if INTERPRETED else ["cublas", *names]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_sms", [16, 100, 132])
def test_gemm_variants_match_float64(num_sms, has_bias):
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    if not INTERPRETED:
        kernels.load("cuda")
        kernels.load("experimental")
    rows, width, depth = (70, 130, 96) if INTERPRETED else (330, 1160, 1024)
    x, weight = randn(rows, depth, seed=7), randn(width, depth, seed=8)
    if INTERPRETED:
        width = 132
        weight = randn(width, depth, seed=8)
    bias = randn(width, seed=9) if has_bias else None
    reference = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for name in gemm_variants():
        buffer = torch.full((rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
        registry._VARIANTS["gemm", name, "cuda"].kernel(x, weight, bias, buffer[1:-1], num_sms)
        assert relative_error(buffer[1:-1], reference) < tolerance(), name
        assert bool(buffer[0].isnan().all() and buffer[-1].isnan().all()), name


# (rows, width, depth): one tile; fewer tiles than SMs; more, with and without a rest; a depth that
# is no multiple of a tile's; a rest of one tile; a single k-step.
SPLITK_SHAPES = [
    (1, 8, 64),
    (70, 136, 1096),
    (300, 712, 640),
    (260, 1024, 200),
    (640, 256, 512),
    (130, 264, 40),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_sms", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", SPLITK_SHAPES, ids=str)
def test_splitk_gemm_matches_float64_and_repeats_its_bits(shape, num_sms):
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    rows, width, depth = shape
    x, weight = randn(rows, depth, seed=7), randn(width, depth, seed=8)
    bias = randn(width, seed=9) if num_sms % 2 else None
    reference = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for name in VARIANTS:
        outs = []
        for _ in range(2):
            out = torch.full((rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
            registry._VARIANTS["gemm", name, "cuda"].kernel(x, weight, bias, out[1:-1], num_sms)
            assert bool(out[0].isnan().all() and out[-1].isnan().all()), name
            outs.append(out[1:-1])
        assert relative_error(outs[0], reference) < tolerance(), name
        assert torch.equal(outs[0], outs[1]), name


def test_every_k_step_belongs_to_one_program_and_shares_are_equal():
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import Division

    for tiles, steps, num_sms in [
        (256, 64, 124),
        (256, 224, 132),
        (7, 3, 132),
        (64, 64, 132),
        (132, 64, 132),
        (1, 1, 132),
        (131, 64, 132),
        (5, 448, 16),
    ]:
        division = Division.of(tiles, steps, num_sms)
        assert division.whole_tiles + division.split_tiles == tiles
        assert division.whole_tiles % num_sms == 0
        assert division.programs <= num_sms
        if not division.split_tiles:
            continue
        units, programs = division.split_tiles * steps, division.split_programs
        ends = [p * units // programs for p in range(programs + 1)]
        lengths = [b - a for a, b in pairwise(ends)]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) <= steps
        for a, b in pairwise(ends):
            assert (b - 1) // steps - a // steps <= 1


def test_splitk_gemm_refuses_rows_that_tma_cannot_address():
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    depth = 65 if INTERPRETED else 68
    x, weight, out = randn(8, depth), randn(16, depth), randn(8, 16)
    with pytest.raises(ValueError, match=f"row stride of {depth} elements"):
        registry._VARIANTS["gemm", next(iter(VARIANTS)), "cuda"].kernel(x, weight, None, out, 4)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
def test_new_kernels_give_the_same_bits_in_a_cuda_graph():
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_decode_split import split_decode_attention
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    heads = HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=128)
    operands, rows, _ = decode_operands([1, 1024, 5000, 8192], heads)
    x, weight = randn(330, 1000, seed=7), randn(1160, 1000, seed=8)
    out = torch.empty(330, 1160, device=DEVICE, dtype=DTYPE)
    calls = [
        (lambda: split_decode_attention(*operands, 24), operands[4]),
        *(
            (
                lambda name=name: registry._VARIANTS["gemm", name, "cuda"].kernel(
                    x, weight, None, out, 20
                ),
                out,
            )
            for name in VARIANTS
        ),
    ]
    for call, written in calls:
        call()
        eager = written.clone()
        written.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
            call()
        graph.replay()
        torch.cuda.synchronize()
        chosen = rows if written is operands[4] else slice(None)
        assert torch.equal(written[chosen], eager[chosen])


def test_norm_adds_the_delta_and_normalises():
    from nanoflow_tune.runtime.kernels.triton_rows import add_rms_norm

    residual, delta, weight = randn(5, 96, seed=1), randn(5, 96, seed=2), randn(96, seed=3)
    expected_residual = (residual.float() + delta.float()).to(DTYPE)
    x = expected_residual.double()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = torch.empty_like(residual)
    add_rms_norm(residual, delta, weight, out, 1e-5, 132)
    assert torch.equal(residual, expected_residual)
    assert relative_error(out, expected) < tolerance()
    add_rms_norm(residual, None, weight, out, 1e-5, 132)
    assert relative_error(out, expected) < tolerance()


def test_silu_mul_matches_float64():
    from nanoflow_tune.runtime.kernels.triton_rows import silu_mul

    up_gate = randn(7, 2 * 80, seed=4)
    out = torch.empty(7, 80, device=DEVICE, dtype=DTYPE)
    silu_mul(up_gate, out, 132)
    up, gate = up_gate.double().chunk(2, dim=-1)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < tolerance()


def test_rope_append_rotates_and_writes_the_slots(heads):
    from nanoflow_tune.runtime.kernels.triton_rows import rope_append

    width = heads.qo_size + 2 * heads.kv_size
    qkv = randn(3, width, seed=11)
    before = qkv.double().clone()
    half = heads.head_dim // 2
    angles = torch.arange(64, device=DEVICE)[:, None] * torch.logspace(0, -3, half, device=DEVICE)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    positions = torch.tensor([0, 5, 63], device=DEVICE, dtype=torch.int32)
    slots = torch.tensor([3, 40, 17], device=DEVICE, dtype=torch.int32)
    pages = [
        torch.full((4, heads.num_kv_heads, PAGE, heads.head_dim), float("nan"), device=DEVICE).to(
            DTYPE
        )
        for _ in range(2)
    ]
    rope_append(qkv, positions, slots, cos_sin, pages[0], pages[1], heads, 132)
    cos, sin = cos_sin[positions.long()].double().chunk(2, dim=-1)
    x = before[:, : heads.qo_size + heads.kv_size].view(3, -1, heads.head_dim)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat(
        [
            first * cos[:, None] - second * sin[:, None],
            second * cos[:, None] + first * sin[:, None],
        ],
        dim=-1,
    ).flatten(1)
    assert relative_error(qkv[:, : heads.qo_size + heads.kv_size], rotated) < tolerance()
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        k = qkv[row, heads.qo_size : heads.qo_size + heads.kv_size]
        v = qkv[row, heads.qo_size + heads.kv_size :]
        assert torch.equal(pages[0][page, :, offset].flatten(), k)
        assert torch.equal(pages[1][page, :, offset].flatten(), v)
    written = sum(int((~p.isnan()).sum()) for p in pages)
    assert written == 2 * 3 * heads.kv_size
