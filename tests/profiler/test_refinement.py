"""Dense where curves bend and nowhere else: straight lines, staircases, dominated variants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.refinement import BEND, next_points, predicted_s

from .curves import explore, family, linear, row_of, staircase

MIDDLES = (40, 80, 116)
"""Of the coarse stretches 16-64, 64-100, 100-132, one test each; nearest legal shares."""


def shares_of(rows, tokens=2048, variant="a"):
    return {p.num_sms for p in rows if p.tokens == tokens and p.variant == variant}


def test_a_straight_curve_is_tested_once_in_each_stretch():
    rows, _, is_whole = explore([family()], linear)
    assert is_whole
    refined = shares_of(rows) - {132, 100, 64, 16}
    assert len(refined) == 3
    assert all(
        abs(share - middle) <= 4
        for share, middle in zip(sorted(refined), sorted(MIDDLES), strict=True)
    )
    between = {p.tokens for p in rows} - {2048, 512, 1024}
    assert len(between) == 2
    assert {p.num_sms for p in rows if p.tokens in between} == {132}


def test_a_staircase_is_measured_on_both_sides_of_its_steps_and_not_on_its_plateaus():
    """256 tiles of 128 x 256: 2 waves from 128 SMs on, 3 from 86, 4 from 64."""
    made = family(tokens=(1024,))
    rows, _, is_whole = explore([made], staircase())
    assert is_whole
    shares = sorted(shares_of(rows, tokens=1024))
    for step in (128, 86):
        below = max(share for share in shares if share < step)
        above = min(share for share in shares if share >= step)
        legal = [s for s in made.lattice if below < s < above]
        assert not legal, f"the step at {step} lies between {below} and {above}, not closer"
    assert [share for share in shares if 100 < share < 116] == [108]
    assert not {68, 72} & set(shares)


def test_interpolation_is_right_everywhere_after_refining():
    time_of, made = staircase(), family(tokens=(2048,))
    rows, _, _ = explore([made], time_of)
    known = sorted(shares_of(rows))
    for share in made.lattice:
        if share < 64:
            continue  # waves of many tiles: steps lie closer than shares
        low = max(s for s in known if s <= share)
        high = min(s for s in known if s >= share)
        ends = [rows[made.point("a", 2048, s)].median_us for s in (low, high)]
        weight = (share - low) / (high - low) if high > low else 0.0
        guess = 1 / ((1 - weight) / ends[0] + weight / ends[1])
        true = time_of(made.point("a", 2048, share))
        assert guess == pytest.approx(true, rel=2 * BEND)


def test_rows_are_refined_where_waves_quantise_there_with_all_coarse_shares():
    """Steps of 256 rows between 1024 and 2048 on 132 SMs: 2, 2, 3, 3 ... waves."""

    def time_of(point):
        return 100.0 if point.tokens <= 1024 else 200.0

    rows, _, _ = explore([family()], time_of)
    between = {p.tokens for p in rows if 1024 < p.tokens < 2048 and p.num_sms == 132}
    assert min(between) == 1152
    bent = {p.tokens for p in rows if 1024 < p.tokens < 2048 and p.num_sms == 100}
    assert bent
    assert not {p.tokens for p in rows if 512 < p.tokens < 1024} - {768, 640, 896}


def test_dominated_variants_keep_their_coarse_rows_only():
    def time_of(point):
        return linear(point) * {"a": 1.0, "close": 1.1, "slow": 1.2}[point.variant]

    rows, _, _ = explore([family(variants=("a", "close", "slow"))], time_of)
    assert shares_of(rows, variant="slow") == {132, 100, 64}
    assert len(shares_of(rows, variant="close")) > 3
    assert {p.tokens for p in rows if p.variant == "slow"} == {2048, 512, 1024}


def test_a_variant_that_is_best_on_few_sms_is_refined_there():
    def time_of(point):
        if point.variant == "few":
            return linear(point) * (0.8 if point.num_sms <= 64 else 1.5)
        return linear(point)

    rows, _, _ = explore([family(variants=("a", "few"), tokens=(2048,))], time_of)
    refined = shares_of(rows, variant="few") - {132, 100, 64}
    assert refined
    assert all(share < 100 for share in refined)


def test_hopeless_variants_are_left_out_between_rows_that_show_it():
    def time_of(point):
        return linear(point) * (1.4 if point.variant == "hopeless" else 1.0)

    rows, _, _ = explore([family(variants=("a", "hopeless"))], time_of)
    assert {p.tokens for p in rows if p.variant == "hopeless"} == {2048, 512}


def test_failed_rows_are_neither_measured_again_nor_refined_around():
    made = family(variants=("a", "b"))
    rows = {}
    for share in made.shares:
        for tokens in made.tokens:
            rows[made.point("a", tokens, share)] = row_of(
                made.point("a", tokens, share), linear(made.point("a", tokens, share))
            )
            bad = made.point("b", tokens, share)
            rows[bad] = replace(row_of(bad, 0.0), error="too many registers")
    assert not [point for point in next_points([made], rows) if point.variant == "b"]


def test_the_next_points_depend_on_the_rows_alone():
    rows, _, _ = explore([family()], staircase(), seconds=2.0)
    backwards = dict(reversed(rows.items()))
    assert next_points([family()], rows) == next_points([family()], backwards)


def test_slow_points_are_predicted_to_take_longer():
    fast, slow = (family().point("a", tokens, share) for tokens, share in ((512, 132), (2048, 8)))
    assert predicted_s(fast) < predicted_s(slow)
    assert predicted_s(fast, row_of(fast, 1e6)) == pytest.approx(7, rel=0.1)
