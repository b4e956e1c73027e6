from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.book import make_bucket
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.gain_curve import gain_curve
from nanoflow_tune.autotune.point_search import PointSearch
from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_space

SEARCH = PointSearch(
    graph=OpGraph.build(load_model("llama3-8b")),
    cost_model=CostModel(None, load_hardware("h200"), "bfloat16"),
    space=load_space("quick"),
)


def _bucket(rows):
    return make_bucket(rows, SEARCH, SEARCH.solve(rows, (), ()))


def _rows(decodes, context):
    return RowMix(
        decode_tokens=decodes,
        prefill_tokens=512 - decodes,
        decode_context_tokens=context,
        prefill_context_tokens=256.5,
    )


def test_the_curve_is_what_the_simulator_says_at_each_load():
    bucket = _bucket(_rows(256, 1024.0))
    curve = gain_curve(bucket, SEARCH)
    assert curve.keys_per_row == (256.0, 362.0, 512.0, 724.1, 1024.0)
    own = bucket.sequential.predicted.period_us / bucket.best_overlapped.predicted.period_us - 1
    assert curve.at(bucket.keys_per_row) == pytest.approx(own, abs=1e-3)
    twice = replace(_rows(256, 2048.0), prefill_context_tokens=513.0)
    times = [
        SEARCH.predicted(candidate.schedule, twice).predicted.period_us
        for candidate in (bucket.sequential, bucket.best_overlapped)
    ]
    assert curve.gains[-1] == pytest.approx(times[0] / times[1] - 1, abs=1e-3)


def test_without_decode_rows_there_is_no_curve():
    assert gain_curve(_bucket(_rows(0, 0.0)), SEARCH) is None
