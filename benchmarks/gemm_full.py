"""Persistent GEMM on the whole GPU against cuBLAS, every layer shape: `gemm_full`.

    python benchmarks/gemm_full.py --commit $(git rev-parse --short HEAD)

A burst picks the few fastest own variants of a case; they meet cuBLAS in sustained turns, and the
one that is fastest there counts: bursts differ by several percent from what the power cap leaves.
"""

from __future__ import annotations

import ab

TOKENS = (512, 1024, 2048)
REACH = ">= 0.97"
FINALISTS, FINALISTS_WITHIN = 3, 1.06
"""Own variants in the turns of a case, and how far behind the burst's best."""
_VARIANTS_EXPECTED = 16  # for the predicted seconds: --dry-run needs no kernels


def main() -> None:
    bench = ab.Bench("gemm_full", __doc__ or "", TOKENS)
    keys = ab.gemm_cases(bench.tokens)
    cases = bench.chosen(keys)
    if bench.is_dry_run:
        per_case = ab.predicted_s(_VARIANTS_EXPECTED, (FINALISTS + 1) * bench.rounds)
        bench.print_plan(cases, len(cases) * per_case)
        return
    bench.start()
    own = [name for name in ab.gpu_variants("gemm") if not ab.is_cublas(name)]
    shapes = dict.fromkeys(keys[case][0] for case in cases)
    names = [*own, "cublas"]
    bench.warm(ab.gemm_point(shape, v, 512, bench.num_sms) for shape in shapes for v in names)
    for case in cases:
        if bench.is_over:
            break
        shape, tokens = keys[case]
        points = [ab.gemm_point(shape, v, tokens, bench.num_sms) for v in own]
        best = bench.ranked(points, FINALISTS_WITHIN)[:FINALISTS]
        theirs = ab.gemm_point(shape, "cublas", tokens, bench.num_sms)
        batches = {point.variant: bench.batch(point) for point in (theirs, *best)}
        turns = ab.take_turns(bench.sweep.timer, batches, bench.rounds)
        mine = min((turns[point.variant] for point in best), key=lambda turn: turn.median_us)
        bench.add([ab.ratio("gemm_full", case, REACH, mine, turns["cublas"])])
    bench.finish()


if __name__ == "__main__":
    main()
