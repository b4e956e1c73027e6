from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.admission import DecodeLengths, fits_peak, peak_pages, steady_rows

PAGE = 4


def brute_force_peak(growths, page_size):
    horizon = int(max(-remaining for remaining, _ in growths)) + 1
    return (
        max(
            sum(
                held + time + (page_size - 1) / 2
                for remaining, held in growths
                if time <= -remaining
            )
            for time in range(horizon)
        )
        / page_size
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 30).map(lambda n: -float(n)), st.integers(0, 50)),
        min_size=1,
        max_size=12,
    )
)
def test_the_peak_is_what_a_walk_through_time_finds(growths):
    assert peak_pages(sorted(growths), PAGE) == pytest.approx(brute_force_peak(growths, PAGE))


def test_a_request_that_outlives_the_average_is_expected_to_double():
    lengths = DecodeLengths(expected=10.0)
    assert lengths.remaining(0, 100) == 10
    assert lengths.remaining(10, 100) == 10
    assert lengths.remaining(25, 100) == 15
    assert lengths.remaining(25, 30) == 5
    for _ in range(2000):
        lengths.add(40)
    assert lengths.mean == pytest.approx(40, abs=1)


def fits(num_running, num_waiting, room_pages):
    growth = (-8.0, 8)  # 16 tokens each at the end, whose last page is half empty
    growths = [growth] * (num_running + 1)
    sizes = {"page_size": 4, "tile_rows": 16}
    return fits_peak(growths, growth, num_waiting=num_waiting, room_pages=room_pages, **sizes)


def test_a_tile_of_decodes_is_begun_when_it_can_be_filled():
    assert peak_pages([(-8.0, 8)] * 70, 4) == pytest.approx(70 * 17.5 / 4)
    room = 70 * 17.5 / 4
    assert not fits(64, 100, room)  # 64 are four tiles: 16 more do not fit
    assert fits(63, 100, room)
    assert fits(65, 100, room)  # begun, it is filled as far as may be
    assert not fits(70, 100, room)
    assert fits(64, 6, room)  # nobody else waits
    assert not fits(64, 7, room)
    assert fits(48, 100, room)  # few are not held back
    assert fits(0, 100, 1.0)


def test_a_full_cache_in_steady_state_gains_as_many_prompts_as_it_loses_answers():
    decodes, prompts = steady_rows(20.0, 10.0, room_pages=100.0, page_size=10)
    assert decodes == pytest.approx(1000 / (20 + 5 + 5))
    assert prompts / 20.0 == pytest.approx(decodes / 10.0)
