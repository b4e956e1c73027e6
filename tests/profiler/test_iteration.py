"""Turns of whole iterations: who stays in the run."""

from __future__ import annotations

from nanoflow_tune.profiler.iteration import CLEARLY_WORSE, close_to_fastest


def test_only_the_clearly_worse_have_no_more_turns():
    edge = 100.0 * (1 + CLEARLY_WORSE)
    assert close_to_fastest([edge, 100.0, edge + 0.1, 103.0]) == [0, 1, 3]
    assert close_to_fastest([]) == []
