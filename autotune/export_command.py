"""`nanoflow-tune export`: a plan in the words of another engine, with what is lost on the way.

export --to sglang PLAN.yaml   PD multiplexing YAML, the launch line as a comment
export --to vllm PLAN.yaml     engine arguments with reasons
export --to schema             JSON Schema of plan files
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import yaml

from ..profiler.profile import Profile
from ..profiler.store import load_profile, profile_files, shipped_profile
from ..runtime.plan import Candidate, Plan
from ..runtime.plan_io import load_plan
from ..runtime.plan_schema import plan_schema
from ..search_spaces.loader import load_hardware, load_model
from ..search_spaces.records import content_hash
from ..search_spaces.schema import DTYPE_BYTES, Dtype
from ..search_spaces.whole_file import write_whole
from .export_facts import PDMUX_MIN_GROUPS
from .export_sglang import PDMUX_FILE, export_sglang
from .export_vllm import export_vllm
from .tool_parsers import DEFAULT_TPOT_MS


def export(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the export; returns what `--json` prints.

    Args:
        options: of `tool_parsers.py`.
        say: progress and verdict, one line at a time.

    Raises:
        ValueError: a damaged plan, a missing profile, a limit that cannot be kept.
    """
    if options.to == "schema":
        text = json.dumps(plan_schema(), indent=2) + "\n"
        return _deliver(options, text, {"verdict": "JSON Schema of plan files"}, say)
    if options.plan is None:
        raise ValueError(f"export --to {options.to} needs a plan; give PLAN.yaml")
    plan = load_plan(options.plan)
    candidate: Candidate = getattr(plan.buckets[0], options.schedule)
    model, hardware = load_model(options.model or plan.model), load_hardware(plan.hardware)
    if options.to == "vllm":
        made = export_vllm(plan, candidate, options.schedule, model, hardware)
        text = _head(plan, made.verdict, ()) + _yaml(made.document)
        return _deliver(options, text, {**made.document, "verdict": made.verdict}, say)
    tpot_ms = DEFAULT_TPOT_MS if options.tpot_ms is None else options.tpot_ms
    if not tpot_ms > 0 or options.sm_groups < PDMUX_MIN_GROUPS:
        raise ValueError(
            f"--tpot-ms must be positive and --sm-groups at least {PDMUX_MIN_GROUPS}, but got "
            f"{tpot_ms:g} and {options.sm_groups}"
        )
    profile, notes = _profile(options, plan)
    if options.tpot_ms is None:
        notes.append(
            f"DEFAULT IN FORCE: time per token <= {DEFAULT_TPOT_MS:g} ms; the table depends on it, "
            "give --tpot-ms"
        )
    made = export_sglang(
        plan,
        candidate,
        options.schedule,
        model,
        hardware,
        profile,
        tpot_ms=tpot_ms,
        sm_groups=options.sm_groups,
    )
    for note in notes:
        say(note)
    path = str(options.output or PDMUX_FILE)
    launch = " ".join(made.launch).replace(PDMUX_FILE, path)
    text = _head(plan, made.verdict, (*notes, f"launch: {launch}")) + _yaml(made.document)
    values = {**made.document, "launch": launch, "verdict": made.verdict, "notes": notes}
    return _deliver(options, text, values, say)


def _profile(options: argparse.Namespace, plan: Plan) -> tuple[Profile | None, list[str]]:
    """The profile that the curves come from, and what the reader must know about it."""
    if options.profile == "roofline":
        return None, ["curves come from the datasheet, which flatters every kernel"]
    if options.profile == "shipped":
        profile = shipped_profile(plan.hardware)
    else:
        path = Path(options.profile)
        if not path.exists():
            raise ValueError(
                "--profile must be shipped, roofline or the path of a profile, but "
                f"{options.profile!r} does not exist; check the path"
            )
        profile = load_profile(profile_files(path))
    if profile is None:
        raise ValueError(
            f"the curves need a measured profile of {plan.hardware!r}, but none is shipped; run "
            "`nanoflow-tune profile` on that GPU and pass --profile PATH, or --profile roofline"
        )
    if profile.hardware != plan.hardware:
        raise ValueError(
            f"a profile must be of the plan's GPU, but it is of {profile.hardware!r} and the plan "
            f"of {plan.hardware!r}; give another --profile"
        )
    if DTYPE_BYTES[cast(Dtype, profile.dtype)] != DTYPE_BYTES[plan.dtype]:
        if options.profile != "shipped":
            raise ValueError(
                f"a profile must be of the plan's element width, but it is of {profile.dtype} and "
                f"the plan of {plan.dtype}; give another --profile, or --profile roofline"
            )
        why = f"the shipped profile is of {profile.dtype}, the plan of {plan.dtype}"
        return None, [f"curves come from the datasheet, which flatters every kernel: {why}"]
    notes = [f"curves come from the {options.profile} profile, not from runs of SGLang"]
    made_from = plan.inputs.get("profile")
    if made_from and made_from != content_hash(profile):
        notes.append("that is another profile than the plan was made from (hashes differ)")
    return profile, notes


def _head(plan: Plan, verdict: str, lines: tuple[str, ...]) -> str:
    job = f"{plan.model} on {plan.num_gpus} x {plan.hardware}, workload {plan.workload}"
    comments = (f"{job}; {plan.created_by}", verdict, *lines)
    return "".join(f"# {comment}\n" for comment in comments)


class _Dumper(yaml.SafeDumper):
    """Block style, rows of numbers on one line."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flow = all(isinstance(value, int | float) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1 << 20, allow_unicode=True)


def _deliver(
    options: argparse.Namespace, text: str, values: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    say(values["verdict"])
    if options.output is not None:
        write_whole(options.output, text)
        say(f"wrote {options.output}")
    elif not options.json:
        print(text, end="")
    written = str(options.output) if options.output else None
    return {"to": options.to, "output": written, **values}
