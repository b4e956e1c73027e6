"""Specs by name, by path and as YAML: what is read, and what each refusal says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow_tune.search_spaces.loader import (
    SpecError,
    content_hash,
    from_mapping,
    known,
    load_hardware,
    load_model,
    load_space,
    load_workload,
    load_yaml,
    to_mapping,
)
from nanoflow_tune.search_spaces.schema import ModelSpec

LOADERS = {
    "models": load_model,
    "hardware": load_hardware,
    "workloads": load_workload,
    "spaces": load_space,
}
SHIPPED = [(kind, name) for kind in LOADERS for name in known(kind)]
TINY = load_model("tiny-llama")


def write_model(path, **changes):
    values = to_mapping(TINY) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v != "absent"}))
    return path


def test_known_lists_what_the_design_asks_for():
    assert set(known("models")) >= {
        *("llama2-70b", "llama3-70b", "llama3-8b", "qwen2-72b", "deepseek-67b", "mixtral-8x7b"),
        "tiny-llama",
    }
    assert set(known("hardware")) == {
        *("v100", "a100-40", "a100-80", "h100", "h200", "b100", "b200", "ada6000"),
        *("mi250", "mi300", "mi325x", "gaudi2", "gaudi3"),
    }
    assert set(known("workloads")) == {
        *("512-512", "1024-512", "512-1024", "512-0", "lmsys", "sharegpt", "splitwise"),
    }
    assert known("spaces") == ("full", "quick")


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_shipped_specs_load_under_their_file_name_and_round_trip(kind, name, tmp_path):
    record = LOADERS[kind](name)
    assert record.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(to_mapping(record), sort_keys=False))
    assert LOADERS[kind](path) == record
    assert content_hash(LOADERS[kind](str(path))) == content_hash(record)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-70b", 68.98),
        ("llama3-70b", 70.55),
        ("llama3-8b", 8.03),
        ("qwen2-72b", 72.71),
        ("deepseek-67b", 67.42),
        ("mixtral-8x7b", 46.70),
    ],
)
def test_shipped_models_have_their_published_number_of_parameters(name, billions):
    assert load_model(name).num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_token_meets_two_experts_of_mixtral_and_all_of_a_dense_model():
    mixtral, dense = load_model("mixtral-8x7b"), load_model("llama3-8b")
    assert mixtral.num_active_parameters / 1e9 == pytest.approx(12.88, abs=0.01)
    idle = 32 * 6 * 3 * 4096 * 14336
    assert mixtral.num_parameters - mixtral.num_active_parameters == idle
    assert dense.num_active_parameters == dense.num_parameters


def test_a_dense_models_hash_does_not_know_of_experts():
    assert "num_local_experts" not in to_mapping(TINY)
    assert to_mapping(load_model("mixtral-8x7b"))["num_local_experts"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "belong to `architecture: mixtral`, and to no other"),
        ({"architecture": "mixtral"}, "belong to `architecture: mixtral`"),
        (
            {"architecture": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "at least 1 and at most `num_local_experts`, but got num_local_experts=2",
        ),
    ],
)
def test_experts_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message):
        load_model(write_model(tmp_path / "m.yaml", **changes))


@pytest.mark.parametrize("hardware", known("hardware"))
def test_shipped_hardware_has_a_peak_for_the_published_models(hardware):
    spec = load_hardware(hardware)
    if hardware == "v100":  # its tensor cores know no bfloat16
        with pytest.raises(ValueError, match="v100 has no peak for dtype 'bfloat16'; it knows fl"):
            spec.peak("bfloat16")
        return
    for model in set(known("models")) - {"tiny-llama"}:
        assert spec.peak(load_model(model).torch_dtype) > 0


def test_shipped_hardware_is_told_apart_by_what_the_driver_calls_it():
    names = [load_hardware(name).device_name for name in known("hardware")]
    assert len(set(names)) == len(names)


def test_hashes_differ_when_a_value_does_and_not_when_its_spelling_does():
    workload = load_workload("512/512")
    assert content_hash(workload) == content_hash(replace(workload, prompt_tokens=512))
    assert content_hash(workload) != content_hash(replace(workload, prompt_tokens=513.0))
    assert len(content_hash(workload)) == 16


def test_workload_lengths_can_be_given_directly():
    assert load_workload("512/512") == load_workload("512-512")
    assert load_workload("300/20.5").decode_tokens == 20.5
    with pytest.raises(SpecError, match="workload 0/5: `prompt_tokens` must be positive"):
        load_workload("0/5")


def test_unknown_names_list_the_known_and_the_closest():
    with pytest.raises(SpecError) as caught:
        load_model("lama3-8B")
    assert str(caught.value) == (
        "unknown model 'lama3-8B'; did you mean 'llama3-8b'? known are "
        f"{', '.join(known('models'))}; or give the path of a YAML file or of a Hugging Face folder"
    )
    with pytest.raises(SpecError, match=r"unknown hardware 'zzz'; known are a100-40, .*; or give"):
        load_hardware("zzz")
    with pytest.raises(SpecError, match=r"unknown search space 'fast'; .*full, quick"):
        load_space("fast")
    with pytest.raises(SpecError, match=r"unknown workload '1/2/3'; .*or PROMPT/DECODE such as"):
        load_workload("1/2/3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 1}, r"`hiden_size`: unknown key; did you mean 'hidden_size'\? ModelSpec"),
        ({"zzz": 1}, "`zzz`: unknown key; ModelSpec takes name, architecture, hidden_size"),
        ({"vocab_size": "absent"}, "ModelSpec needs vocab_size; add what is missing"),
        ({"vocab_size": "512"}, r"`vocab_size`: must be a whole number, but got '512' \(str\)"),
        ({"vocab_size": 512.0}, r"`vocab_size`: must be a whole number, but got 512.0 \(float\)"),
        ({"vocab_size": True}, r"`vocab_size`: must be a whole number, but got True \(bool\)"),
        ({"vocab_size": None}, r"`vocab_size`: must be a whole number, but got None"),
        ({"rope_theta": True}, r"`rope_theta`: must be a number, but got True \(bool\)"),
        ({"rope_theta": "1e6"}, "must be a number: YAML wants a dot and a signed exponent, but"),
        ({"rope_theta": "high"}, r"`rope_theta`: must be a number, but got 'high' \(str\)"),
        ({"rope_theta": float("nan")}, "`rope_theta`: must be a finite number, but got nan"),
        ({"rope_theta": 10**400}, "`rope_theta`: must be a finite number, but got 1000"),
        ({"name": 8}, r"`name`: must be text \(quote it\), but got 8 \(int\)"),
        ({"tie_word_embeddings": 1}, "`tie_word_embeddings`: must be true or false, but got 1"),
        (
            {"architecture": "gpt2"},
            "`architecture`: must be one of llama, qwen2, mixtral, but got 'gpt2'",
        ),
        ({"hidden_size": -1}, "`hidden_size` must be positive, but got"),
    ],
)
def test_model_file_that_breaks_a_rule_names_file_key_and_rule(tmp_path, changes, message):
    path = write_model(tmp_path / "bad.yaml", **changes)
    with pytest.raises(SpecError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_keys_that_are_no_text_are_refused(tmp_path):
    path = write_model(tmp_path / "bad.yaml")
    path.write_text(path.read_text() + "8: 1\n")
    with pytest.raises(SpecError, match=r"keys must be text, but got 8 \(int\); quote it"):
        load_model(path)


def test_nested_keys_are_named_with_their_path(tmp_path):
    path = tmp_path / "gpu.yaml"
    values = to_mapping(load_hardware("h200"))
    path.write_text(yaml.safe_dump(values | {"peak_flops_per_s": {"bfloat16": "fast"}}))
    with pytest.raises(SpecError, match=r"`peak_flops_per_s\.bfloat16`: must be a number"):
        load_hardware(path)
    space = to_mapping(load_space("quick"))
    path.write_text(yaml.safe_dump(space | {"sm_shares": [16, "x"]}))
    with pytest.raises(SpecError, match=r"`sm_shares\[1\]`: must be a whole number, but got 'x'"):
        load_space(path)
    path.write_text(yaml.safe_dump(space | {"sm_shares": 16}))
    with pytest.raises(SpecError, match=r"`sm_shares`: must be a list, but got 16 \(int\)"):
        load_space(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", r"line 2, column 1: key 'a' is given twice; keep one"),
        (b"a: {b: 1, b: 2}\n", "key 'b' is given twice; keep one"),
        (b"a: [1\n", "must be valid YAML, but line 2, column 1"),
        (b"a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (b"a: 2001-99-99\n", "a value cannot be read as tag:yaml.org,2002:timestamp"),
        (b"a: !!int ''\n", "a value cannot be read as tag:yaml.org,2002:int"),
        (b"a: \x00\n", "must be valid YAML"),
        (b"- 1\n", r"must hold a mapping \(`key: value` lines\), but holds a list"),
        (b"", "must hold a mapping .* but holds a NoneType"),
        (b"\xff", "must be UTF-8 text, but byte 0 is not"),
        (b"[" * 5000, "must not nest this deeply; flatten it"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read \(No such file or directory"):
        load_model(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match=r"folder\.yaml: cannot be read \(Is a directory\)"):
        load_space(tmp_path / "folder.yaml")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(sorted(to_mapping(TINY)))


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(fields | st.text(), values, max_size=3), base=st.booleans())
def test_random_values_give_a_model_or_a_spec_error(changes, base):
    mapping = (to_mapping(TINY) if base else {}) | changes
    try:
        model = from_mapping(ModelSpec, mapping, "fuzz")
    except SpecError:
        return
    assert from_mapping(ModelSpec, to_mapping(model), "again") == model


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet="ab:-[]{}&*!|>'\"?,.#%<= \n\t01_e+~", max_size=60).map(str.encode)
    | values.map(lambda value: yaml.safe_dump(value).encode())
)
def test_random_files_give_a_spec_error(tmp_path, content):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError):
        load_model(path)
