"""`--dry-run`: what the job would tune, from which profile, into which folder; nothing is run.

Inputs are read and checked as by the job itself, so that bad ones are refused alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .job import TuneOptions, choose_profile, default_folder, profile_path, resolve
from .output_folder import claim


def dry_run(options: TuneOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan of a job as data.

    Args:
        options: of the job.
        say: progress, one line at a time.

    Raises:
        ValueError: what the job would refuse before it starts.
    """
    job = resolve(options, say)
    folder = options.output_dir or default_folder(job)
    is_measured = job.stage is not None
    named: dict[str, object] = {
        "model": job.model.name,
        "hardware": job.hardware.name,
        "num_gpus": job.num_gpus,
        "workload": job.workload.name,
    }
    replaced = claim(folder, named, is_measured=is_measured)
    if options.profile == "auto" and is_measured:
        profile = f"measured here into {profile_path(job)}, beside the shipped rows of this GPU"
    else:
        profile = choose_profile(options, job).title
    steps = ["search"]
    if is_measured:
        steps = ["profile what is missing", "search", "measure the finalists"]
    if options.buckets != ():
        steps.append("plan book of other batches")
    if not options.is_search_only:
        steps.append(f"verify on {job.num_gpus} {'GPU' if is_measured else 'CPU'} rank(s)")
        steps.append("figures and report")
    return {
        "dry_run": True,
        **named,
        "dense_batch_tokens": job.batch.tokens,
        "decode_tokens": job.batch.decode_tokens,
        "kv_gigabytes": round(job.batch.memory.kv_bytes / 1e9, 1),
        "profile": profile,
        "will_be": "measured" if is_measured else "predicted",
        "steps": steps,
        "output_dir": str(folder),
        "replaces": replaced.removeprefix("replaces ") or None,
        "reasons": list(job.reasons),
    }
