"""What `sanitize.py` runs under `compute-sanitizer`: every CUDA C++ kernel once or a few times.

    python tests/gpu/sanitized_calls.py                 each kernel alone on one GPU
    python tests/gpu/sanitized_calls.py --num-gpus 2    collectives between two GPUs
    python tests/gpu/sanitized_calls.py --plant         a read past an allocation, on purpose

Shapes are small and odd, results are checked as well: a wrong one ends with an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_reference import assert_rows, decode_operands, relative_error
from lone_rank import Outcome, add_alone, all_gather_alone, all_reduce_alone

from nanoflow_tune.runtime import kernels
from nanoflow_tune.runtime.kernels.registry import HeadShape, kernel
from nanoflow_tune.runtime.launch import RankContext, RankGroup

GEMM_CALLS = ((200, 784, 328, 20), (65, 1008, 712, 6))
"""(rows, columns, depth, SMs): no multiple of a tile in any dimension, whole and divided waves."""
HEADS = ((64, 4), (128, 8), (128, 16))
"""(head dimension, query heads of a KV head)."""
KV_LENS = [1, 16, 17, 333, 700]
BLOCKS = 3


def gemms() -> None:
    """Every family of the Hopper GEMM, with and without SiLU and bias."""
    from nanoflow_tune.profiler.compile_ahead import compile_tiles, point_tiles
    from nanoflow_tune.profiler.profile import Point
    from nanoflow_tune.runtime.kernels.sm90_gemm import FAMILIES

    points = [
        Point(kind=k, shape=f"n{n}_k{d}", variant=f.name, tokens=rows, kv_len=0, num_sms=sms)
        for k in ("gemm", "gemm_silu")
        for f in FAMILIES
        for rows, n, d, sms in GEMM_CALLS
    ]
    compile_tiles(point_tiles(points))
    for index, family in enumerate(FAMILIES):
        for rows, columns, depth, num_sms in GEMM_CALLS:
            generator = torch.Generator(device="cuda").manual_seed(index)
            x, weight, bias = (
                torch.randn(*shape, device="cuda", generator=generator).bfloat16()
                for shape in ((rows, depth), (columns, depth), (columns,))
            )
            reference = x.double() @ weight.double().T
            out = torch.full((rows, columns), float("nan"), device="cuda").bfloat16()
            kernel("gemm", family.name, "cuda")(x, weight, bias, out, num_sms)
            assert relative_error(out, reference + bias.double()) < 4e-3, family.name
            up, gate = reference.chunk(2, dim=-1)
            out = torch.full((rows, columns // 2), float("nan"), device="cuda").bfloat16()
            kernel("gemm_silu", family.name, "cuda")(x, weight, None, out, num_sms)
            assert relative_error(out, torch.nn.functional.silu(gate) * up) < 8e-3, family.name


def attention() -> None:
    """Decode attention of both head dimensions; a request of one key, others that are divided."""
    for head_dim, group in HEADS:
        heads = HeadShape(num_qo_heads=2 * group, num_kv_heads=2, head_dim=head_dim)
        operands, rows, reference = decode_operands(KV_LENS, heads)
        kernel("decode_attention", "sm90", "cuda")(*operands, 4)
        torch.cuda.synchronize()
        assert_rows(operands[4], rows, reference)


def check(outcome: Outcome) -> None:
    """The result, and that no signal was left or forgotten."""
    assert torch.equal(outcome.result, outcome.expected)
    assert not outcome.own_signals.any(), "a signal was left raised"
    assert all(bool((signals == 1).all()) for signals in outcome.peer_signals)


def lone_ranks() -> None:
    """Kernels over peers' memory, one rank at a time."""
    for world_size in (2, 3):
        for rank in range(world_size):
            for algorithm in ("one_shot", "two_shot"):
                check(all_reduce_alone(algorithm, rank, world_size, 7, 264, BLOCKS))
                check(all_reduce_alone(algorithm, rank, world_size, 1, 8, BLOCKS))
            check(all_gather_alone(rank, world_size, 7, 264, BLOCKS)[0])
            result, expected = add_alone(rank, world_size, 7, 264, BLOCKS)
            assert torch.equal(result, expected)


def on_one_gpu() -> None:
    """All kernels alone."""
    kernels.load("cuda")
    for part in (gemms, attention, lone_ranks):
        part()
        torch.cuda.synchronize()
        print(f"{part.__name__}: done", flush=True)


def on_rank(ctx: RankContext) -> None:
    """Collectives in step with the other rank; odd rows, one after the other.

    The groups hold no communicators of their own: NCCL's start takes minutes under a sanitizer.
    """
    from collective_ranks import check as check_sum
    from collective_ranks import partials, reduce_rows

    from nanoflow_tune.runtime.kernels.copy_engine import CopyEngine
    from nanoflow_tune.runtime.kernels.gather_buffer import GatherBuffers, output_rows
    from nanoflow_tune.runtime.kernels.symmetric_all_reduce import SymmetricLane

    kernels.load("cuda")
    group = {
        "symmetric": SymmetricLane(),
        "copy_engine": CopyEngine(),
        "gathered": GatherBuffers(),
    }
    for variant in ("symm_one_shot_8", "symm_two_shot_8", "copy_engine_add"):
        for rows in (1, 7, 129):
            parts = partials(ctx, rows, rows)
            result = reduce_rows(variant, parts[ctx.rank].clone(), group)
            torch.cuda.synchronize()
            check_sum(variant, result, parts)
    for rows in (1, 129):
        parts = partials(ctx, rows, rows, 264)
        width = ctx.world_size * 264
        out = output_rows(group, rows, width, torch.bfloat16, torch.device(ctx.device))
        kernel("all_gather", "symm_8", "cuda")(parts[ctx.rank], out, group, 8)
        torch.cuda.synchronize()
        assert torch.equal(out, torch.cat(parts, dim=1)), f"all-gather of {rows} rows"


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--plant", action="store_true")
    given = parser.parse_args()
    if given.plant:
        add_alone(0, 2, 7, 264, BLOCKS, missing_rows=1)
    elif given.num_gpus > 1:
        with RankGroup(given.num_gpus, device="cuda", timeout_s=240.0) as ranks:
            ranks.call(on_rank)
    else:
        on_one_gpu()
    print("all calls are right", flush=True)


if __name__ == "__main__":
    main()
