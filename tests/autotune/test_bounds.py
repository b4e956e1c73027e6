from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.bounds import lower_bound_us, power_limit_us, what_binds
from nanoflow_tune.autotune.cost_model import H200_ENERGY
from nanoflow_tune.runtime.op_graph import OpGraph

from .fakes import MIX, graph_of, h200


def test_compute_binds_a_large_batch_and_counts_every_parameter_twice_per_token():
    graph = graph_of("llama2-70b", 2)
    bound_us, resource = lower_bound_us(graph, MIX, h200(), "bfloat16")
    layers = graph.model.layer_parameters * graph.num_layers / 2
    assert resource == "compute"
    assert bound_us == pytest.approx(2 * layers * 2048 / 989e12 * 1e6, rel=0.06)


def test_memory_binds_a_small_batch_and_counts_each_weight_once():
    graph = graph_of("llama3-8b")
    mix = replace(MIX, decode_tokens=1, prefill_tokens=0, decode_context_tokens=1)
    bound_us, resource = lower_bound_us(graph, mix, h200(), "bfloat16")
    weights = graph.model.weight_bytes - graph.model.vocab_size * graph.model.hidden_size * 2
    assert resource == "memory"
    assert bound_us == pytest.approx(weights / 4.8e12 * 1e6, rel=1e-3)


def test_network_binds_on_a_slow_link():
    slow = replace(h200(), link_bytes_per_s=1e9)
    assert lower_bound_us(graph_of("llama2-70b", 2), MIX, slow, "bfloat16")[1] == "network"


def test_each_resource_has_the_cheaper_form():
    """Few heads: to gather them and the projection's output sends less than an all-reduce."""
    graph = graph_of("llama2-70b", 2)
    slow = replace(h200(), link_bytes_per_s=1e9)
    narrow = OpGraph.build(replace(graph.model, head_dim=64), 2)
    reduced = lower_bound_us(narrow.in_form("all_reduce"), MIX, slow, "bfloat16")[0]
    gathered = lower_bound_us(narrow.in_form("all_gather"), MIX, slow, "bfloat16")[0]
    assert gathered < reduced
    assert lower_bound_us(narrow, MIX, slow, "bfloat16") == (gathered, "network")
    # 64 heads of 128 are as wide as hidden: both forms send as much.
    both = [lower_bound_us(graph.in_form(form), MIX, slow, "bfloat16") for form in graph.forms]
    assert both[0] == pytest.approx(both[1])


def test_power_limit_is_dynamic_joules_over_the_watts_left():
    graph = graph_of("llama3-8b")
    limit_us = power_limit_us(graph, MIX, h200(), H200_ENERGY)
    doubled = power_limit_us(graph, MIX, replace(h200(), power_cap_w=117 + 2 * 583), H200_ENERGY)
    assert limit_us == pytest.approx(2 * doubled)
    assert power_limit_us(graph, MIX, h200(), None) == 0.0
    assert what_binds((1.0, "compute"), 2.0) == "power"
    assert what_binds((3.0, "memory"), 2.0) == "memory"


def test_a_cap_below_static_power_is_refused():
    with pytest.raises(ValueError, match="must exceed the static power"):
        power_limit_us(graph_of("llama3-8b"), MIX, replace(h200(), power_cap_w=100), H200_ENERGY)
