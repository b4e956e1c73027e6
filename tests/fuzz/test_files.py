"""Every file that the tool reads, damaged: a refusal that says why, or success; nothing else."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from command_line import empty_folder, run
from hypothesis import given
from hypothesis import strategies as st
from mutations import BOMB, LAUGHS, damaged_bytes, damaged_document, tries

from nanoflow_tune.autotune import cli
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.output_folder import DOCUMENT
from nanoflow_tune.autotune.profile_faults import profile_warnings
from nanoflow_tune.profiler.store import load_profile
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan_io import check_plan, dump_plan, load_plan
from nanoflow_tune.search_spaces.loader import SpecError, load_hardware, load_model, load_space

SPECS = files("nanoflow_tune.search_spaces")
REPORTS = Path(__file__).parents[2] / "results" / "reports"
DRY = ("--dry-run", "--json", "--profile", "roofline")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": None,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "layer_types": ["full_attention"],
}


def spec(kind, name):
    return SPECS.joinpath(kind, f"{name}.yaml").read_bytes()


def damaged(valid):
    return damaged_bytes(valid) | damaged_document(yaml.safe_load(valid))


@tries(100, 4000)
@given(damaged(json.dumps(CONFIG, indent=2).encode()))
def test_config_json(content):
    with empty_folder() as folder:
        Path("config.json").write_bytes(content)
        run(("--model", "config.json", *DRY))
        assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["tiny-llama", "mixtral-8x7b"])
@tries(50, 2000)
@given(data=st.data())
def test_model_yaml(name, data):
    with empty_folder() as folder:
        Path("m.yaml").write_bytes(data.draw(damaged(spec("models", name))))
        run(("--model", "m.yaml", *DRY))
        assert [path.name for path in folder.iterdir()] == ["m.yaml"]


@tries(80, 3000)
@given(damaged(spec("hardware", "h200")))
def test_hardware_yaml(content):
    with empty_folder() as folder:
        Path("gpu.yaml").write_bytes(content)
        run(("--model", "tiny-llama", "--gpu", "gpu.yaml", *DRY))
        run(("models", "--gpu", "gpu.yaml", "--json"))
        assert [path.name for path in folder.iterdir()] == ["gpu.yaml"]


@tries(80, 3000)
@given(damaged(spec("workloads", "sharegpt")))
def test_workload_yaml(content):
    with empty_folder() as folder:
        Path("load.yaml").write_bytes(content)
        run(("--model", "tiny-llama", "--workload", "load.yaml", *DRY))
        assert [path.name for path in folder.iterdir()] == ["load.yaml"]


@tries(80, 3000)
@given(damaged(spec("spaces", "quick")))
def test_space_yaml(content):
    """No flag takes a file of this kind; the function that reads it refuses by the same rules."""
    with empty_folder():
        Path("space.yaml").write_bytes(content)
        with suppress(SpecError):
            load_space("space.yaml")


@pytest.mark.parametrize("bomb", [BOMB, LAUGHS, BOMB + spec("models", "tiny-llama")])
@pytest.mark.parametrize("flag", ["--model", "--gpu", "--workload"])
def test_alias_bombs_are_refused_before_they_are_read(bomb, flag):
    with empty_folder():
        Path("bomb.yaml").write_bytes(bomb)
        given_model = () if flag == "--model" else ("--model", "tiny-llama")
        code, _, err = run((*given_model, flag, "bomb.yaml", *DRY))
        assert code == cli.BAD_INPUT
        assert "aliases stand for more than" in err


ROWS = (
    b"# hardware: h200\n# dtype: bfloat16\n# gpu: NVIDIA H200\n# static_w: 117\n"
    + b"\n".join(
        line
        for line in (
            Path(__file__).parents[2] / "results" / "profiles" / "h200" / "llama3-8b-tp1.csv"
        )
        .read_bytes()
        .splitlines()
        if not line.startswith(b"#")
    )[:6000].rsplit(b"\n", 1)[0]
    + b"\n"
)
PAIRS, TRIPLES = (
    (
        Path(__file__).parents[2] / "results" / "profiles" / "h200" / f"llama3-8b-tp1.{kind}.csv"
    ).read_bytes()
    for kind in ("pairs", "triples")
)


@tries(80, 4000)
@given(damaged_bytes(ROWS), st.just(PAIRS) | damaged_bytes(PAIRS), damaged_bytes(TRIPLES))
def test_profile_csv(rows, pairs, triples):
    with empty_folder():
        Path("p.csv").write_bytes(rows)
        Path("p.pairs.csv").write_bytes(pairs)
        Path("p.triples.csv").write_bytes(triples)
        code, _, _ = run(("--model", "llama3-8b", "--dry-run", "--profile", "p.csv"))
        if code == cli.DONE:
            use_profile()


@tries(80, 4000)
@given(damaged_bytes(ROWS))
def test_profile_csv_alone(rows):
    with empty_folder():
        Path("p.csv").write_bytes(rows)
        code, _, _ = run(("--model", "llama3-8b", "--dry-run", "--profile", "p.csv"))
        if code == cli.DONE:
            use_profile()


def use_profile():
    """What a run does first with a profile that was taken."""
    with suppress(ValueError):
        profile = load_profile([Path("p.csv")])
        profile_warnings(profile, OpGraph.build(load_model("llama3-8b"), 1))
        CostModel(profile, load_hardware("h200"), "bfloat16")


def short_plan():
    """A shipped plan in today's schema with its first bucket alone: damage hits what is read."""
    plan = load_plan(REPORTS / "llama3-8b-h200-tp1" / "plan.yaml")
    with tempfile.TemporaryDirectory() as folder:
        dump_plan(replace(plan, buckets=plan.buckets[:1]), Path(folder) / "plan.yaml")
        return yaml.safe_load((Path(folder) / "plan.yaml").read_bytes())


SHORT_PLAN = short_plan()


@tries(40, 4000)
@given(damaged_document(SHORT_PLAN) | damaged_bytes(yaml.safe_dump(SHORT_PLAN).encode()))
def test_plan_yaml(content):
    with empty_folder() as folder:
        Path("plan.yaml").write_bytes(content)
        code, _, _ = run(("export", "--to", "vllm", "plan.yaml", "--output", "out.txt"))
        assert (folder / "out.txt").exists() == (code == cli.DONE)
        Path("good.yaml").write_bytes(yaml.safe_dump(SHORT_PLAN).encode())
        code, _, _ = run(("report", "good.yaml", "plan.yaml", "--output-dir", "both", "--json"))
        assert (folder / "both").exists() == (code == cli.DONE)
        names = {path.name for path in folder.iterdir()}
        assert names <= {"plan.yaml", "good.yaml", "out.txt", "both"}
        with suppress(ValueError):
            plan = load_plan(Path("plan.yaml"))
            model, hardware = load_model(plan.model), load_hardware(plan.hardware)
            check_plan(plan, OpGraph.build(model, plan.num_gpus), hardware)


@tries(15, 500)
@given(damaged_document(SHORT_PLAN))
def test_plan_yaml_for_sglang(content):
    with empty_folder():
        Path("plan.yaml").write_bytes(content)
        run(("export", "--to", "sglang", "plan.yaml", "--profile", "roofline"))


def report_of_today():
    """A shipped report, with what was measured of each nano-op and the history of the search."""
    values = json.loads(sorted(REPORTS.glob(f"*/{DOCUMENT}"))[0].read_bytes())
    values["history"] = [[0, "sequential", 7e4], [1, "overlapped_milp", 7.1e4]]
    for rows in values["ops"].values():
        for row in rows:
            row["measured_us"] = 1.05 * row["beside_us"]
    return json.dumps(values, indent=2).encode()


@tries(60, 3000)
@given(damaged(report_of_today()))
def test_report_json(content):
    with empty_folder():
        Path("job").mkdir()
        (Path("job") / DOCUMENT).write_bytes(content)
        run(("report", "job"))
        names = {path.name for path in Path("job").iterdir()}
        assert names <= {DOCUMENT, "report.html"}
        run(("--model", "tiny-llama", "--output-dir", "job", *DRY))
