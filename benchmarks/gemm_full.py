"""Persistent GEMM on the whole GPU against cuBLAS, every layer shape: `gemm_full`.

    python benchmarks/gemm_full.py --commit $(git rev-parse --short HEAD)

The fastest persistent variants of a burst meet cuBLAS in sustained turns.
"""

from __future__ import annotations

import ab

TOKENS = (512, 1024, 2048)
REACH = 0.97
_VARIANTS_EXPECTED = 6  # for the predicted seconds: --dry-run needs no kernels


def main() -> None:
    bench = ab.Bench("gemm_full", __doc__ or "", TOKENS)
    shapes = ab.gemm_shapes()
    keys = {
        f"{origin} {shape} {tokens} tokens": (shape, tokens)
        for shape, origin in shapes.items()
        for tokens in bench.tokens
    }
    cases = bench.chosen(keys)
    if bench.is_dry_run:
        per_case = ab.predicted_s(_VARIANTS_EXPECTED, 2 * bench.rounds)
        bench.print_plan(cases, len(cases) * per_case)
        return
    bench.start()
    persistent = [name for name in ab.gpu_variants("gemm") if name != "cublas"]
    for case in cases:
        shape, tokens = keys[case]
        best = bench.fastest(ab.gemm_point(shape, v, tokens, bench.num_sms) for v in persistent)
        cublas = ab.gemm_point(shape, "cublas", tokens, bench.num_sms)
        batches = {point.variant: bench.batch(point) for point in (cublas, best)}
        turns = ab.take_turns(bench.sweep.timer, batches, bench.rounds)
        bench.add([ab.ratio("gemm_full", case, REACH, turns[best.variant], turns["cublas"])])
    bench.finish()


if __name__ == "__main__":
    main()
