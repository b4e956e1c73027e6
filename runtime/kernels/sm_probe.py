"""A probe kernel that reports which SMs a stream's blocks really ran on (%smid)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _read_smid(out_ptr, spin):  # noqa: ANN001, ANN202 - Triton kernel
    """Write this block's SM id, after spinning so that every SM of the partition gets blocks."""
    smid = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    start = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    now = start
    while now - start < spin:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    tl.store(out_ptr + tl.program_id(0), smid)


def seen_sm_ids(stream: torch.cuda.Stream, num_sms: int) -> frozenset[int]:
    """SM ids that many short blocks on `stream` ran on, launched eagerly and from a CUDA graph.

    32 blocks per SM of the whole GPU, 50 us each: far more than fit at once, so every SM of the
    partition takes some.
    """
    blocks = 32 * num_sms
    seen: set[int] = set()
    out = torch.full((blocks,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _read_smid[(blocks,)](out, 50_000, num_warps=1)
    stream.synchronize()
    seen.update(out.tolist())
    out.fill_(-1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    fork = torch.cuda.Event()
    join = torch.cuda.Event()
    with torch.cuda.graph(graph):
        fork.record()
        stream.wait_event(fork)
        with torch.cuda.stream(stream):
            _read_smid[(blocks,)](out, 50_000, num_warps=1)
            join.record()
        torch.cuda.current_stream().wait_event(join)
    graph.replay()
    torch.cuda.synchronize()
    seen.update(out.tolist())
    return frozenset(seen)


def spin(seconds: float) -> None:
    """Keep one warp busy for `seconds`: what the board draws at full clocks with no work."""
    out = torch.empty(1, dtype=torch.int32, device="cuda")
    for _ in range(max(1, round(seconds / 0.1))):
        _read_smid[(1,)](out, 100_000_000, num_warps=1)
