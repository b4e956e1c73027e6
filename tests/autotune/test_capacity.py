from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.capacity import (
    DoesNotFitError,
    activation_bytes,
    allowed_num_gpus,
    dense_batch,
    num_gpus_default,
    rank_weight_bytes,
    row_mix,
)
from nanoflow_tune.search_spaces.loader import (
    load_hardware,
    load_model,
    load_space,
    load_workload,
)

H200, QUICK, STEADY = load_hardware("h200"), load_space("quick"), load_workload("512/512")


@pytest.mark.parametrize(
    ("name", "gpu", "expected"),
    [
        ("llama3-8b", "h200", 1),
        ("llama2-70b", "h200", 2),
        ("llama3-70b", "h200", 2),
        ("qwen2-72b", "h200", 2),
        ("deepseek-67b", "h200", 2),
        ("mixtral-8x7b", "h200", 1),
        ("llama2-70b", "a100-80", 4),
    ],
)
def test_default_number_of_gpus_leaves_a_third_of_the_memory(name, gpu, expected):
    assert num_gpus_default(load_model(name), load_hardware(gpu)) == expected


@pytest.mark.parametrize(
    ("name", "num_gpus", "tokens", "decodes"),
    [("llama3-8b", 1, 2048, 1024), ("llama2-70b", 2, 1024, 512)],
)
def test_dense_batch_is_the_largest_whose_kv_fits(name, num_gpus, tokens, decodes):
    batch = dense_batch(load_model(name), H200, STEADY, QUICK, num_gpus)
    assert (batch.tokens, batch.decode_tokens) == (tokens, decodes)
    assert batch.mix.decode_context_tokens == 768
    assert batch.memory.fits
    assert batch.memory.kv_bytes > decodes * 768 * load_model(name).kv_bytes_per_token / num_gpus


def test_too_few_gpus_are_refused_with_bytes_and_remedy():
    with pytest.raises(DoesNotFitError, match=r"bytes.*use --num-gpus 2"):
        dense_batch(load_model("llama2-70b"), H200, STEADY, QUICK, 1)


def test_number_of_gpus_must_divide_the_heads():
    with pytest.raises(ValueError, match=r"but got 3; choose from 1, 2, 4, 8"):
        dense_batch(load_model("llama2-70b"), H200, STEADY, QUICK, 3)
    assert allowed_num_gpus(load_model("llama2-70b"), H200) == (1, 2, 4, 8)


def test_prefill_only_traffic_has_no_decodes():
    mix = row_mix(load_workload("512/0"), 2048)
    assert (mix.decode_tokens, mix.prefill_tokens) == (0, 2048)


def test_decode_rows_are_a_multiple_of_eight():
    mix = row_mix(load_workload("1024/512"), 2048)
    assert mix.decode_tokens % 8 == 0
    assert mix.tokens == 2048


def test_experts_take_a_buffer_for_every_routed_row():
    mixtral, dense = load_model("mixtral-8x7b"), load_model("llama3-8b")
    more = activation_bytes(mixtral, 1, 100) - activation_bytes(
        replace(dense, vocab_size=mixtral.vocab_size), 1, 100
    )
    # Beyond one row through the FFN: another one, and each row at the way in and out, twice.
    assert more == 100 * 2 * (3 * 14336 + 2 * 2 * 4096)


def test_every_rank_has_the_whole_router():
    model = load_model("mixtral-8x7b")
    repeated = rank_weight_bytes(model, 1) - 2 * (
        rank_weight_bytes(model, 1) - rank_weight_bytes(model, 2)
    )
    norms_and_router = 32 * (2 + 8) * 4096 + 4096
    assert repeated == 2 * (norms_and_router + 32000 * 4096)
