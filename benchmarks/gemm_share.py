"""Persistent GEMM on SM shares against the same part of the whole GPU's rate: `gemm_share`.

    python benchmarks/gemm_share.py --commit $(git rev-parse --short HEAD)

For each share a burst picks the fastest own variant; the whole GPU's rate is that of the fastest
variant of all, cuBLAS included. All shares of a shape take turns with it. A share runs at higher
clocks than the whole GPU at its power cap, which a ratio above 1 shows: read the clocks beside it.
"""

from __future__ import annotations

import ab

TOKENS = (512, 1024, 2048)
SHARES = (124, 116, 108, 100, 84, 64)
REACH = ">= 0.95"
_VARIANTS_EXPECTED = 14  # for the predicted seconds: --dry-run needs no kernels


def main() -> None:
    bench = ab.Bench("gemm_share", __doc__ or "", TOKENS)
    keys = ab.gemm_cases(bench.tokens)
    cases = bench.chosen(keys)
    if bench.is_dry_run:
        contenders = 1 + len(SHARES)
        per_case = ab.predicted_s(contenders * _VARIANTS_EXPECTED, contenders * bench.rounds)
        bench.print_plan(cases, len(cases) * per_case)
        return
    bench.start()
    variants = ab.gpu_variants("gemm")
    own = [name for name in variants if not ab.is_cublas(name)]
    shapes = dict.fromkeys(keys[case][0] for case in cases)
    bench.warm(ab.gemm_point(shape, v, 512, bench.num_sms) for shape in shapes for v in variants)
    for case in cases:
        if bench.is_over:
            break
        shape, tokens = keys[case]

        def fastest(
            num_sms: int, names: list[str], shape: str = shape, tokens: int = tokens
        ) -> ab.Point:
            return bench.fastest(ab.gemm_point(shape, name, tokens, num_sms) for name in names)

        points = [fastest(bench.num_sms, list(variants))]
        points += [fastest(share, own) for share in SHARES]
        labels = [f"{point.variant} on {point.num_sms}" for point in points]
        batches = {name: bench.batch(point) for name, point in zip(labels, points, strict=True)}
        turns = ab.take_turns(bench.sweep.timer, batches, bench.rounds)
        bench.add(
            ab.ratio(
                "gemm_share",
                f"{case} {point.num_sms} SMs",
                REACH,
                turns[name],
                turns[labels[0]],
                point.num_sms / bench.num_sms,
            )
            for name, point in zip(labels[1:], points[1:], strict=True)
        )
    bench.finish()


if __name__ == "__main__":
    main()
