"""`nanoflow-serve` as a process: a small checkpoint on the CPU, on one rank and on two."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from builders import gathering_bucket
from engine_builders import bucket, plan_of
from tiny_tokenizer import byte_level, fast, save

from nanoflow_tune.runtime import server
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan_io import dump_plan
from nanoflow_tune.search_spaces.loader import content_hash, load_model

PROMPT = "the capital of France is"
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=byte_level().get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return save(folder)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What transformers generates greedily."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = fast(byte_level())(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
    return byte_level().decode(out[0, ids.shape[1] :].tolist())


def _write_plan(path, checkpoint, num_gpus=1, **changes):
    model = load_model(checkpoint)
    own = bucket(OpGraph.build(model, num_gpus), 64, 32)
    plan = plan_of(model, num_gpus, (own if num_gpus == 1 else gathering_bucket(own),))
    plan = replace(plan, inputs={"model": content_hash(model)})
    dump_plan(replace(plan, **changes), path)
    return path


@contextlib.contextmanager
def _served(plan, weights, *flags):
    command = [sys.executable, "-c", "import sys; from nanoflow_tune.runtime.server import main; "]
    command[-1] += "sys.exit(main())"
    command += ["--plan", plan, "--weights", weights, "--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # the ranks' standard output is their parent's standard error
        text=True,
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"serving (\S+) at (http://\S+)", line):
                yield process, found[1], found[2]
                break
        else:
            pytest.fail("".join(said))
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_checkpoint_is_served_like_transformers_generates(
    checkpoint, expected, tmp_path, num_gpus
):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint, num_gpus)
    with _served(plan, checkpoint, "--kv-cache-gib", "0.01") as (_, name, url):
        assert name == "small"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        request = {"model": name, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
        assert client.completions.create(**request).choices[0].text == expected
        chunks = list(client.completions.create(**request, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        drawn = [
            client.completions.create(**request | {"temperature": 1.0, "seed": 3}).choices[0].text
            for _ in range(2)
        ]
        assert drawn[0] == drawn[1] != expected
        logprobs = client.completions.create(**request, logprobs=2).choices[0].logprobs
        assert len(logprobs.tokens) == MAX_TOKENS
        for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert logprob == pytest.approx(max(top.values()))  # greedy
            assert logprob < 0
        page = httpx.get(f"{url}/metrics").text
        assert "nanoflow_generated_tokens_total" in page
        client.close()


def test_random_weights_are_served_in_token_ids(checkpoint, tmp_path):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    model = ("--model", checkpoint / "config.json", "--kv-cache-gib", "0.01")
    with _served(plan, "random:1", *model, "--model-name", "drawn") as (_, name, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        reply = client.completions.create(model=name, prompt=[5, 6, 7], max_tokens=4, temperature=0)
        assert (name, len(reply.choices[0].token_ids)) == ("drawn", 4)
        client.close()


def test_random_weights_chat_with_a_tokenizer_and_a_template(checkpoint, tmp_path):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = ("--model", checkpoint / "config.json", "--kv-cache-gib", "0.01")
    text = ("--tokenizer", checkpoint, "--chat-template", template)
    with _served(plan, "random:1", *model, *text) as (_, name, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        request = {"model": name, "max_tokens": 4, "temperature": 0}
        plain = client.completions.create(**request, prompt=PROMPT)
        messages = [{"role": "user", "content": PROMPT}]
        chat = client.chat.completions.create(**request, messages=messages)
        assert plain.choices[0].text
        assert chat.choices[0].message.content
        client.close()


def test_tokenizers_that_do_not_go_with_the_model_are_refused(checkpoint, tmp_path, capsys):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    flags = ("--plan", plan, "--device", "cpu", "--kv-cache-gib", "0.01")
    drawn = (*flags, "--weights", "random", "--model", checkpoint / "config.json")
    code, said = _main(capsys, *drawn, "--tokenizer", tmp_path)
    assert (code, "--tokenizer must be a folder with one of tokenizer.json" in said) == (2, True)
    code, said = _main(capsys, *drawn, "--chat-template", tmp_path / "x.jinja")
    assert (code, "--chat-template needs a tokenizer" in said) == (2, True)
    large = tmp_path / "large"
    tokenizer = fast(byte_level())
    tokenizer.add_tokens([f"<extra {index}>" for index in range(400)])
    tokenizer.save_pretrained(large)
    code, said = _main(capsys, *drawn, "--tokenizer", large)
    assert (code, "--tokenizer must fit the model" in said) == (2, True)


def _main(capsys, *flags):
    code = server.main([str(flag) for flag in flags])
    return code, capsys.readouterr().err


def test_bad_input_is_told_and_exits_with_2(checkpoint, tmp_path, capsys):
    other = _write_plan(tmp_path / "other.yaml", checkpoint, inputs={"model": "0"}, model="big")
    flags = ("--weights", checkpoint, "--device", "cpu")
    assert _main(capsys, "--plan", tmp_path / "none.yaml", *flags)[0] == 2
    code, said = _main(capsys, "--plan", other, *flags)
    assert code == 2
    assert "the plan is for another model than 'small'" in said
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    code, said = _main(capsys, "--plan", plan, "--weights", tmp_path / "none")
    assert (code, "--weights must be a folder" in said) == (2, True)
    code, said = _main(capsys, "--plan", plan, *flags, "--max-model-len", "4096")
    assert (code, "at most the model's 128 positions" in said) == (2, True)
    code, said = _main(capsys, "--plan", plan, *flags, "--kv-cache-gib", "0.00001")
    assert (code, "raise --kv-cache-gib" in said) == (2, True)
    code, said = _main(capsys, "--plan", plan, *flags, "--num-gpus", "2")
    assert (code, "2 were asked for" in said) == (2, True)


def _setting(*flags):
    options = server.build_parser().parse_args([str(flag) for flag in flags])
    return server.read_inputs(options, say=lambda _: None)[0]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_limits_and_host_memory_reach_the_engine(checkpoint, tmp_path, num_gpus):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint, num_gpus)
    flags = ("--plan", plan, "--weights", checkpoint, "--device", "cpu", "--kv-cache-gib", "0.01")
    bare = _setting(*flags).config
    assert (bare.latency.ttft_s, bare.latency.tpot_s) == (None, None)
    assert (bare.offload_host_pages, bare.offload_disk_pages) == (0, 0)
    assert bare.limits.max_swapped_pages is None
    page = 2 * 2 * 16 * 2 * 8 * 4  # layers, keys and values, tokens, heads, head dim, fp32
    gib = page / 2**30
    more = ("--ttft-ms", 500, "--tpot-ms", 40, "--swap-gib", 5 * gib, "--kv-offload-gib", 3 * gib)
    config = _setting(*flags, *more).config
    assert (config.latency.ttft_s, config.latency.tpot_s) == (0.5, 0.04)
    assert (config.offload_host_pages, config.offload_disk_pages) == (3, 0)
    assert config.limits.max_swapped_pages == 5
    more = (*more, "--kv-offload-dir", tmp_path)
    assert _setting(*flags, *more).config.offload_disk_pages == 3
    setting = _setting(*flags, *more, "--kv-offload-disk-gib", 7 * gib, "--swap-gib", 0)
    assert setting.config.offload_disk_pages == 7
    assert setting.config.limits.max_swapped_pages == 0
    assert _setting(*flags, "--dense-batch", 20).book.target_rows == 32


def test_pages_of_finished_requests_go_to_the_folder_and_come_back(checkpoint, tmp_path):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    kept = tmp_path / "kept"
    kept.mkdir()
    gib = 3 * 4096 / 2**30  # three pages in host memory, as many on disk: one request in each
    flags = ("--kv-cache-gib", "0.01", "--kv-offload-gib", gib, "--kv-offload-dir", kept)
    with _served(plan, checkpoint, *flags) as (_, name, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)

        def answer(first):
            reply = client.completions.create(
                model=name, prompt=list(range(first, first + 40)), max_tokens=4, temperature=0
            )
            return reply.choices[0].text

        before = answer(10)
        answer(60)
        assert answer(10) == before  # cache operations run with the step after
        (folder,) = kept.iterdir()
        assert [file.suffix for file in folder.iterdir()] == [".pages"]
        page = httpx.get(f"{url}/metrics").text
        assert re.search(r"nanoflow_prefix_tokens\S* 32", page), page
        client.close()
    assert list(kept.iterdir()) == []


def test_offload_flags_that_mean_nothing_are_refused(checkpoint, tmp_path, capsys):
    plan = _write_plan(tmp_path / "plan.yaml", checkpoint)
    flags = ("--plan", plan, "--weights", checkpoint, "--device", "cpu")
    for more, rule in (
        (("--kv-offload-dir", tmp_path), "give --kv-offload-gib too"),
        (("--kv-offload-gib", 1, "--kv-offload-disk-gib", 1), "give --kv-offload-dir too"),
        (("--kv-offload-gib", 1, "--kv-offload-dir", plan), "must be a folder"),
        (("--kv-offload-gib", 1e-9), "must hold one page"),
    ):
        code, said = _main(capsys, *flags, *more)
        assert (code, rule in said) == (2, True), said


def test_without_the_extra_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    known = server.importlib.util.find_spec
    monkeypatch.setattr(
        server.importlib.util, "find_spec", lambda name: None if name == "fastapi" else known(name)
    )
    code, said = _main(capsys, "--plan", tmp_path / "p.yaml", "--weights", tmp_path)
    assert code == 2
    assert "serving needs fastapi: install them with `pip install 'nanoflow-tune[serve]'`" in said


def test_the_key_comes_from_a_file_or_the_environment_not_both(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert server.api_key(file, None) == "secret"
    assert server.api_key(None, "other") == "other"
    assert server.api_key(None, None) is server.api_key(None, "") is None
    with pytest.raises(ValueError, match="both set"):
        server.api_key(file, "other")
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        server.api_key(file, None)
    with pytest.raises(ValueError, match="cannot be read"):
        server.api_key(tmp_path / "none", None)


def test_starting_the_command_imports_no_torch():
    code = "import sys; from nanoflow_tune.runtime import server; server.build_parser()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
