"""Printed numbers of arXiv 2408.12757 v2 from the shipped YAMLs: tables 1, 2, 4, figures 2, 3."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune import paper
from nanoflow_tune.autotune.capacity import row_mix
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_workload
from nanoflow_tune.search_spaces.schema import ModelSpec

A100 = load_hardware("a100-80")
LLAMA2_70B = load_model("llama2-70b")

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


TABLE_1 = {  # memory GB, memory GB/s, network GB/s (both ways), FP16 GFLOP/s, as printed
    "v100": (16, 900, 300, 125_000),
    "a100-40": (40, 1_555, 600, 312_000),
    "a100-80": (80, 2_000, 600, 312_000),
    "h100": (80, 3_352, 900, 989_000),
    "h200": (96, 4_800, 900, 989_000),
    "b100": (120, 8_000, 1_800, 1_800_000),
    "b200": (120, 8_000, 1_800, 2_250_000),
    "mi250": (128, 3_352, 800, 362_000),
    "mi300": (192, 5_300, 1_024, 1_307_000),
    "mi325x": (256, 6_000, 1_024, 1_307_000),
    "gaudi2": (96, 2_400, 600, 1_000_000),
    "gaudi3": (128, 3_700, 1_200, 1_800_000),
    "ada6000": (48, 960, 64, 182_000),
}
MISPRINTED = {"h200": 141, "b100": 192, "b200": 192}  # memory GB as shipped


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_is_shipped_with_the_misprinted_sizes_put_right(name):
    hardware = load_hardware(name)
    gigabytes, memory, network, flops = TABLE_1[name]
    assert hardware.memory_bytes_per_s == memory * 1e9
    assert hardware.link_bytes_per_s == network * 1e9 / 2
    assert hardware.peak("float16") == flops * 1e9
    if name in MISPRINTED:
        # The H200's is what its driver reports, some 7 % above the 141 GB of its datasheet.
        assert hardware.memory_bytes / 1e9 == pytest.approx(MISPRINTED[name], rel=0.08)
    else:
        assert hardware.memory_bytes == gigabytes * 1e9


def as_in_the_paper(name: str) -> ModelSpec:
    """The model in FP16, as table 1 counts FLOPs; the one that is not shipped, in line.

    The experts of Mixtral enter through the parameter count alone.
    """
    if name != "llama3-405b":
        return replace(load_model(name), torch_dtype="float16")
    return replace(
        load_model("llama3-8b"),
        name="llama3-405b",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        torch_dtype="float16",
    )


# Rounded counts that reproduce the printed figures. Of Mixtral, both figures count the 12.6e9
# parameters that are active for a token, figure 3 even for the bytes of its weights (46.7e9).
NOMINAL_PARAMETERS = {
    "llama3-8b": 8e9,
    "mixtral-8x7b": 12.6e9,
    "llama2-70b": 70e9,
    "qwen2-72b": 72e9,
    "llama3-405b": 405e9,
}
# One row a model; columns as table 1 has rows. 405B runs on 8 GPUs x 2 pipeline stages: a stage
# has half of the layers and half of the parameters, which cancel out.
FIGURE_2 = """
llama3-8b    .382 .477 .477 1.008 1.008 .918 1.147 .415 1.171 1.171 1.529 1.376 2.609
mixtral-8x7b .243 .303 .303 .640 .640 .583 .728 .264 .744 .744 .971 .874 1.657
llama2-70b   .218 .273 .273 .576 .576 .524 .655 .237 .669 .669 .874 .786 1.491
qwen2-72b    .212 .265 .265 .560 .560 .510 .637 .231 .651 .651 .850 .765 1.450
llama3-405b  .119 .148 .148 .314 .314 .285 .357 .129 .364 .364 .476 .428 .812
"""
FIGURE_2_CELLS = [
    (model, hardware, float(ratio))
    for model, *ratios in map(str.split, FIGURE_2.strip().splitlines())
    for hardware, ratio in zip(TABLE_1, ratios, strict=True)
]


@pytest.mark.parametrize(("model", "hardware", "ratio"), FIGURE_2_CELLS)
def test_figure_2_network_to_compute_ratio_on_eight_gpus(model, hardware, ratio):
    spec, accelerator = as_in_the_paper(model), load_hardware(hardware)
    value = paper.network_compute_ratio(spec, accelerator, 8, NOMINAL_PARAMETERS[model])
    assert value == pytest.approx(ratio, abs=0.00051)
    other_memory = replace(accelerator, memory_bytes=1)
    assert value == paper.network_compute_ratio(spec, other_memory, 8, NOMINAL_PARAMETERS[model])


TABLE_4 = {  # prompt and generated tokens, mean (standard deviation)
    "lmsys": (102, 169, 222, 210),
    "splitwise": (1155, 1109, 211, 163),
    "sharegpt": (246, 547, 322, 244),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_table_4_is_shipped(name):
    workload = load_workload(name)
    prompt = workload.prompt_tokens, workload.prompt_tokens_std
    assert (*prompt, workload.decode_tokens, workload.decode_tokens_std) == TABLE_4[name]


# Columns: lmsys, splitwise, sharegpt, 512-512, 1024-512, 512-1024; all on A100 80GB.
FIGURE_3 = {
    ("llama3-8b", 1): (0.23, 0.31, 0.37, 0.61, 0.68, 1.09),
    ("mixtral-8x7b", 8): (0.12, 0.17, 0.20, 0.32, 0.36, 0.58),
    ("llama2-70b", 8): (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
    ("qwen2-72b", 8): (0.07, 0.09, 0.11, 0.18, 0.20, 0.31),
}
FIGURE_3_CELLS = [
    (*place, workload, ratio)
    for place, ratios in FIGURE_3.items()
    for workload, ratio in zip((*TABLE_4, "512-512", "1024-512", "512-1024"), ratios, strict=True)
]


def figure_3(model: str, num_gpus: int, workload: str) -> float:
    spec, traffic = as_in_the_paper(model), load_workload(workload)
    parameters = NOMINAL_PARAMETERS[model]
    return paper.memory_compute_ratio(spec, A100, num_gpus, traffic, parameters)


@pytest.mark.parametrize(("model", "num_gpus", "workload", "ratio"), FIGURE_3_CELLS)
def test_figure_3_memory_to_compute_ratio(model, num_gpus, workload, ratio):
    # Mixtral comes to 0.164 on Splitwise and 0.195 on ShareGPT where the paper prints 0.17 and
    # 0.20; every other cell rounds to the printed digits.
    tolerance = 0.0062 if model == "mixtral-8x7b" else 0.0051
    assert figure_3(model, num_gpus, workload) == pytest.approx(ratio, abs=tolerance)


def test_figure_3_has_one_memory_bound_cell():
    bound = [cell[:3] for cell in FIGURE_3_CELLS if figure_3(*cell[:3]) > 1]
    assert bound == [("llama3-8b", 1, "512-1024")]


def test_mixtral_is_less_compute_bound_than_figure_3_says():
    # All experts have to be held: 46.7e9 weights leave 11 % less room for KV, so that the batch is
    # smaller, and the ratio that much larger, at 12.6e9 active parameters a token.
    model, workload = as_in_the_paper("mixtral-8x7b"), load_workload("512-1024")
    tokens = paper.max_dense_batch_tokens(model, A100, 8, workload, 46.7e9)
    ratio = paper.memory_us(A100) / paper.compute_us(model, A100, 8, tokens, 12.6e9)
    assert ratio == pytest.approx(0.649, abs=0.001)
    assert ratio / figure_3("mixtral-8x7b", 8, "512-1024") == pytest.approx(1.125, abs=0.001)


def test_prefill_only_traffic_has_no_decode_rows():
    mix = row_mix(load_workload("512-0"), 2048)
    assert (mix.decode_tokens, mix.prefill_tokens) == (0, 2048)
    assert mix.prefill_context_tokens == 256.5


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
