"""The printed numbers of arXiv 2408.12757 v2 (table 2, figures 2 and 3) from the shipped YAMLs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune import paper
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_workload
from nanoflow_tune.search_spaces.schema import WorkloadSpec

A100 = load_hardware("a100-80")
LLAMA2_70B = load_model("llama2-70b")
NOMINAL_PARAMETERS = {"llama3-8b": 8e9, "llama2-70b": 70e9, "qwen2-72b": 72e9}

# name: GFLOP, memory GB, network GB, T_compute, T_mem, T_net in ms, as printed.
TABLE_2 = {
    "KQV": (27487.8, 19.5, 0.0, 11.01, 1.22, 0.0),
    "O": (21990.2, 16.1, 0.0, 8.81, 1.01, 0.0),
    "UG": (153931.6, 96.6, 0.0, 61.67, 6.04, 0.0),
    "D": (76965.8, 49.7, 0.0, 30.84, 3.11, 0.0),
    "DecAttn": (3665.9, 462.2, 0.0, 1.47, 28.89, 0.0),
    "PfAttn": (916.3, 2.1, 0.0, 0.37, 0.13, 0.0),
    "Net": (18.8, 75.2, 75.2, 0.01, 4.70, 31.33),
}
ROWS = {row.name: row for row in paper.table2(LLAMA2_70B, 8, 2048, load_workload("512-1024"))}


def test_table_2_has_the_papers_rows_in_order():
    assert list(ROWS) == list(TABLE_2)


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_flops_match_the_printed_digits(name):
    # DecAttn: 1365.33 rows x 1024 keys are 3665.0 GFLOP; the paper prints 3665.9 (0.02 % more,
    # one FLOP per row and hidden element), the only cell off by more than rounding.
    tolerance = 0.9 if name == "DecAttn" else 0.051
    assert ROWS[name].flops / 1e9 == pytest.approx(TABLE_2[name][0], abs=tolerance)


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_bytes_match_the_printed_digits(name):
    row = ROWS[name]
    assert (round(row.memory_bytes / 1e9, 1), round(row.link_bytes / 1e9, 1)) == TABLE_2[name][1:3]


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_times_match_the_printed_digits(name):
    # The paper divides the rounded GB: D is 49.66 GB = 3.10 ms, but 49.7 GB = 3.11 ms as printed.
    row = replace(
        ROWS[name],
        memory_bytes=round(ROWS[name].memory_bytes / 1e9, 1) * 1e9,
        link_bytes=round(ROWS[name].link_bytes / 1e9, 1) * 1e9,
    )
    times = (row.compute_ms(LLAMA2_70B, A100, 8), row.memory_ms(A100, 8), row.network_ms(A100, 8))
    assert tuple(round(time, 2) for time in times) == TABLE_2[name][3:]


def test_table_2_totals():
    rows = ROWS.values()
    assert sum(row.compute_ms(LLAMA2_70B, A100, 8) for row in rows) == pytest.approx(
        114.17, abs=0.006
    )
    assert sum(row.memory_ms(A100, 8) for row in rows) == pytest.approx(45.09, abs=0.011)
    assert sum(row.network_ms(A100, 8) for row in rows) == pytest.approx(31.33, abs=0.015)


@pytest.mark.parametrize(
    ("hardware", "model", "ratio"),
    [
        ("a100-80", "llama3-8b", 0.477),
        ("a100-80", "llama2-70b", 0.273),
        ("a100-80", "qwen2-72b", 0.265),
        ("h200", "llama3-8b", 1.008),
        ("h200", "llama2-70b", 0.576),
        ("h200", "qwen2-72b", 0.560),
    ],
)
def test_figure_2_network_to_compute_ratio_on_eight_gpus(hardware, model, ratio):
    value = paper.network_compute_ratio(
        load_model(model), load_hardware(hardware), 8, NOMINAL_PARAMETERS[model]
    )
    assert round(value, 3) == ratio


TRAFFIC = {  # table 4: mean prompt and generated tokens
    "LMSYS": (102, 222),
    "Splitwise": (1155, 211),
    "ShareGPT": (246, 322),
    "512-512": (512, 512),
    "1024-512": (1024, 512),
    "512-1024": (512, 1024),
}


@pytest.mark.parametrize(
    ("model", "num_gpus", "ratios"),
    [
        ("llama3-8b", 1, (0.23, 0.31, 0.37, 0.61, 0.68, 1.09)),
        ("llama2-70b", 8, (0.07, 0.09, 0.11, 0.18, 0.20, 0.32)),
        ("qwen2-72b", 8, (0.07, 0.09, 0.11, 0.18, 0.20, 0.31)),
    ],
)
def test_figure_3_memory_to_compute_ratio(model, num_gpus, ratios):
    values = tuple(
        paper.memory_compute_ratio(
            load_model(model),
            A100,
            num_gpus,
            WorkloadSpec(name=name, prompt_tokens=float(prompt), decode_tokens=float(decode)),
            NOMINAL_PARAMETERS[model],
        )
        for name, (prompt, decode) in TRAFFIC.items()
    )
    assert values == pytest.approx(ratios, abs=0.0051)


def test_equation_5_is_the_dense_batch_over_its_compute_time():
    optimum = paper.optimal_tokens_per_s_per_gpu(LLAMA2_70B, A100, 70e9)
    assert optimum == pytest.approx(2228.6, abs=0.1)
    assert 8 * optimum == pytest.approx(
        1e6 * 2048 / paper.compute_us(LLAMA2_70B, A100, 8, 2048, 70e9)
    )


def test_dense_batch_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"weights must leave memory .* \(1 x a100-80\); use more"):
        paper.max_dense_batch_tokens(LLAMA2_70B, A100, 1, load_workload("512-512"), 70e9)
    with pytest.raises(ValueError, match="`decode_tokens` must be positive"):
        paper.max_dense_batch_tokens(LLAMA2_70B, A100, 8, load_workload("512/0"), 70e9)
