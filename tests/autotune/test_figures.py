from __future__ import annotations

import struct

from nanoflow_tune.autotune.figure_style import PALETTE, op_class
from nanoflow_tune.autotune.figures import Chosen, Curve, sm_curves_png, timeline_png
from nanoflow_tune.autotune.trace import track
from nanoflow_tune.runtime.op_graph import OpGraph

from . import report_fakes as fakes


def size(png):
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_timeline_grows_with_the_lanes_it_shows():
    graph = OpGraph.build(fakes.model("llama2-70b"), 2)
    windows = []
    for schedule in (fakes.sequential(graph), fakes.overlapped(graph)):
        events = fakes.events(schedule, graph)
        played = track(
            schedule, graph, events, title=schedule.name, source="predicted", period_us=1e5
        )
        windows.append(played.window(2, 2))
    one = size(timeline_png(windows[:1], title="a", subtitle="b", num_sms=132))
    two = size(timeline_png(windows, title="a", subtitle="b", num_sms=132))
    assert one[0] == two[0]
    assert one[1] < two[1]


def test_every_curve_gets_a_plot():
    curves = [
        Curve(
            op=f"op {number}",
            kind="gemm",
            unit="TFLOP/s",
            num_sms=(8, 64, 132),
            throughput=(60.0, 400.0, 780.0),
            is_measured=(True, False, True),
            is_roofline=False,
            chosen=(Chosen(num_sms=64, throughput=380.0, schedule="winner"),),
        )
        for number in range(9)
    ]
    assert size(sm_curves_png(curves, title="a", subtitle="b"))[1] > 600


def test_every_layer_op_has_a_colour():
    graph = OpGraph.build(fakes.model("llama2-70b"), 2)
    assert {op_class(op.kind) for op in graph.layer} == set(PALETTE)
