"""Checkpoints saved by transformers: the same tokens and logits, and what is refused."""

from __future__ import annotations

import json

import checkpoint_ranks as on_rank
import pytest
import torch

from nanoflow_tune.runtime.checkpoint import CheckpointError, load_checkpoint
from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.search_spaces.loader import SpecError

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 1, 33, 7, 2, 60], [8, 8, 30], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
NEW_TOKENS = 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama_many_kv_heads": ("Llama", {"num_key_value_heads": 8, "head_dim": 6}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_model(name):
    import transformers

    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **(SIZES | changes), attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias"):
                values.normal_()  # transformers starts biases at zero
            elif parameter.endswith("norm.weight"):
                values.uniform_(0.5, 1.5)  # and norms at one
    return model


@pytest.fixture(scope="module")
def ranks():
    with RankGroup(2) as group:
        yield group


@pytest.fixture
def saved(tmp_path):
    """A saved llama in one file."""
    make_model("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def generated_by(model):
    """Tokens and logits of plain greedy decoding, prompt by prompt."""
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logits_TV = model(torch.tensor([text])).logits[0]
            text.append(int(logits_TV[-1].argmax()))
        yield text, logits_TV[len(prompt) - 1 :]


def assert_same(model, results):
    texts = results[0][0]
    assert all(other == texts for other, _ in results)
    for index, (text, expected) in enumerate(generated_by(model)):
        assert texts[index] == text
        got = torch.cat([logits[index] for _, logits in results], dim=-1)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits_equal_transformers(tmp_path, name):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    here = RankContext(0, 1, "cpu")
    assert_same(model, [on_rank.generate(here, tmp_path, PROMPTS, NEW_TOKENS)])


@pytest.mark.parametrize("name", ["llama", "llama3_rope", "qwen2", "qwen2_tied", "mixtral"])
def test_two_ranks_generate_what_transformers_does(tmp_path, ranks, name):
    model = make_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(model, ranks.call(on_rank.generate, tmp_path, PROMPTS, NEW_TOKENS))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_types_are_converted_to_what_is_asked_for(tmp_path, stored):
    model = make_model("qwen2").to(stored)
    model.save_pretrained(tmp_path)
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[stored]
    spec, same = load_checkpoint(tmp_path, device=CPU)
    assert spec.torch_dtype == name
    q_proj = model.model.layers[1].self_attn.q_proj
    assert torch.equal(same.layers[1].kqv_CD[:32], q_proj.weight)
    assert torch.equal(same.layers[1].kqv_bias_C[:32], q_proj.bias)
    wide_spec, wide = load_checkpoint(tmp_path, device=CPU, dtype="float32")
    assert wide_spec.torch_dtype == "float32"
    assert torch.equal(wide.layers[1].kqv_CD[:32], q_proj.weight.float())


def test_a_value_too_large_for_float16_is_refused(tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.up_proj.weight' has values that fl"):
        load_checkpoint(tmp_path, device=CPU, dtype="float16")


def test_a_rank_reads_its_own_slices_only(saved, monkeypatch):
    from nanoflow_tune.runtime import checkpoint

    whole = sum(x.numel() for x in make_model("llama").state_dict().values())
    read = []

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return _CountingSlice(self.file.get_slice(name), read)

    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Counting)
    load_checkpoint(saved, rank=3, tp_degree=4, device=CPU)
    embedding, norms = 61 * 32, 7 * 32
    last_head = (61 - 3 * 16) * 32
    assert sum(read) == (whole - 2 * embedding - norms) // 4 + embedding + norms + last_head


def test_the_output_projection_is_read_in_both_forms_where_a_plan_needs_both(saved):
    matrices = make_model("llama").state_dict()
    whole = [matrices[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(2)]
    ranks = [
        load_checkpoint(saved, rank=r, tp_degree=4, device=CPU, with_o_columns=True)[1]
        for r in range(4)
    ]
    for layer, full in enumerate(whole):
        parts = [rank.layers[layer] for rank in ranks]
        assert torch.equal(torch.cat([part.o_columns_WA for part in parts]), full)
        assert torch.equal(torch.cat([part.o_proj_DQ for part in parts], dim=1), full)


class _CountingSlice:
    def __init__(self, stored, read):
        self.stored, self.read = stored, read

    def get_shape(self):
        return self.stored.get_shape()

    def get_dtype(self):
        return self.stored.get_dtype()

    def __getitem__(self, key):
        x = self.stored[key]
        self.read.append(x.numel())
        return x


def test_tied_embeddings_are_held_once_and_a_stored_head_is_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model("llama_tied").save_pretrained(tmp_path)
    _, weights = load_checkpoint(tmp_path, rank=1, tp_degree=2, device=CPU)
    head = weights.lm_head_VD
    assert head.untyped_storage().data_ptr() == weights.embedding_VD.untyped_storage().data_ptr()
    assert torch.equal(head, weights.embedding_VD[31:])
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(61, 32)}, file)
    _, again = load_checkpoint(tmp_path, rank=1, tp_degree=2, device=CPU)
    assert torch.equal(again.lm_head_VD, head)


def _edit(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"has no tensor '{NORM}'.*llama, 3 layers"),
        (
            lambda t: t.update({NORM: torch.ones(16)}),
            rf"'{NORM}' must have shape \(32,\) by config.json, but has \(16,\)",
        ),
        (
            lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}),
            rf"'{NORM}' has type I8, but weights must be one of BF16, F16, F32",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            r"holds 1 tensors that a llama model of 3 layers does not have.*q_proj.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused(saved, change, message):
    _edit(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, device=CPU)


def test_frequencies_that_older_checkpoints_hold_are_computed_instead(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit(saved, lambda t: t.update({name: torch.ones(2)}))
    load_checkpoint(saved, device=CPU)


def test_folders_without_readable_weights_are_refused(saved, tmp_path):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        load_checkpoint(saved, device=CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors, or model.*index"):
        load_checkpoint(saved, device=CPU)
    (saved / "pytorch_model.bin").write_bytes(b"no pickle is opened")
    with pytest.raises(CheckpointError, match=r"only in pickled files \(pytorch_model.bin\)"):
        load_checkpoint(saved, device=CPU)
    with pytest.raises(CheckpointError, match=r"must be a folder with config.json"):
        load_checkpoint(tmp_path / "nowhere", device=CPU)
    (saved / "config.json").unlink()
    with pytest.raises(SpecError, match=r"config\.json: cannot be read"):
        load_checkpoint(saved, device=CPU)


def test_broken_sets_of_shards_are_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    intact = json.loads(index.read_text())
    shards = sorted(set(intact["weight_map"].values()))

    def load_with(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        load_checkpoint(tmp_path / "m", device=CPU)

    moved = next(shard for shard in shards if shard != intact["weight_map"]["lm_head.weight"])
    with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head.weight', although model"):
        load_with(intact["weight_map"] | {"lm_head.weight": moved})
    with pytest.raises(CheckpointError, match=r"must name .safetensors files of its own folder"):
        load_with(intact["weight_map"] | {"lm_head.weight": "../other.safetensors"})
    with pytest.raises(CheckpointError, match="must have a `weight_map`, but has none"):
        load_with({})
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"1 of {len(shards)} shards .*: {shards[1]}; down"):
        load_with(intact["weight_map"])
    index.write_text("[")
    with pytest.raises(CheckpointError, match="must be valid JSON in UTF-8"):
        load_checkpoint(tmp_path / "m", device=CPU)


def test_a_degree_that_does_not_divide_the_model_is_refused(saved):
    with pytest.raises(ValueError, match=r"num_attention_heads=8, tp_degree=3"):
        load_checkpoint(saved, tp_degree=3, device=CPU)
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 2\), but got rank=2"):
        load_checkpoint(saved, rank=2, tp_degree=2, device=CPU)
