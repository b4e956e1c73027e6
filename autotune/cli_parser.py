"""Flags and verbs of the command line."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from ..profiler.profile import ALL_PARTS
from .book_grid import check_sizes
from .tool_parsers import add_tool_parsers

NOT_OF_PAPER = (
    "verb",
    "model",
    "gpu",
    "num_gpus",
    "profile",
    "output_dir",
    "effort",
    "buckets",
    "storage",
)
"""Flags that `--paper` leaves no choice of."""


def build_parser() -> argparse.ArgumentParser:
    """The main job's flags, and the verbs."""
    parser = argparse.ArgumentParser(
        prog="nanoflow-tune",
        usage="nanoflow-tune --model MODEL [flags]\n       nanoflow-tune VERB ...  "
        "(--help shows the flags, VERB --help those of a verb)",
        description="Tune intra-device parallelism: profile, search, verify, and write one plan "
        "with a report. Without a verb it does all of it for one model.",
        epilog="exit: 0 done, 1 crash, 2 bad input, 3 no feasible plan, 4 verification failed, "
        "5 a GPU failed, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=version("nanoflow-tune"))
    parser.add_argument(
        "--paper",
        action="store_true",
        help="predict LLaMA-2-70B on 8 x A100 80GB with the cost model of arXiv 2408.12757 and "
        "set it beside the paper's figures; takes --workload and --seed",
    )
    _add_job_flags(parser, is_model_required=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", prog=parser.prog)
    search = verbs.add_parser("search", help="the main job without verification and figures")
    _add_job_flags(search)
    profile = verbs.add_parser(
        "profile",
        help="measure the kernels of models on this machine's GPU, or check a profile against it",
    )
    _add_job_flags(profile, is_model_required=False)
    _add_profile_flags(profile)
    verify = verbs.add_parser("verify", help="run a plan against the unsplit run and compare")
    verify.add_argument("plan", type=Path, metavar="PLAN.yaml")
    verify.add_argument("--model", help="the model's spec, where its name alone is not known")
    verify.add_argument("--seed", type=_seed, default=0, help="of weights, pages and orders")
    _add_output_flags(verify)
    models = verbs.add_parser("models", help="list the shipped models, GPUs and workloads")
    models.add_argument("--gpu", default="h200", help="say how many of these each model needs")
    _add_output_flags(models)
    add_tool_parsers(parser, verbs)
    return parser


def _add_job_flags(parser: argparse.ArgumentParser, *, is_model_required: bool = True) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=is_model_required,
        help="a shipped model, a YAML file, or a Hugging Face folder or config.json",
    )
    add("--gpu", help="a shipped GPU or a YAML file (default: this machine's, else h200)")
    add(
        "--num-gpus",
        type=_positive,
        help="tensor-parallel degree (default: the smallest that fits)",
    )
    add("--workload", default="512/512", help="mean PROMPT/DECODE tokens, or a name (%(default)s)")
    add(
        "--profile",
        default="auto",
        metavar="auto|shipped|roofline|PATH",
        help="auto measures on a GPU and takes the shipped profile elsewhere (%(default)s)",
    )
    add("--output-dir", type=Path, help="default: nanoflow-out/<model>-<gpu>-<workload>-tp<N>")
    add(
        "--effort",
        choices=("quick", "full"),
        default="quick",
        help="how many schedules are tried (%(default)s)",
    )
    add("--seed", type=_seed, default=0, help="of all random choices (%(default)s)")
    add(
        "--buckets",
        type=_buckets,
        metavar="main|TOKENS,...",
        help="sizes of the plan book, or the workload's own batch alone (default: 128 to 4096)",
    )
    add(
        "--host-planned",
        action="store_true",
        help="let plans name kernels that plan on the host (FlashInfer): no CUDA graph holds them, "
        "so the engine replaces them",
    )
    _add_output_flags(parser)


def _add_profile_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--models",
        type=_names,
        metavar="NAME[@TP[+TP...]],...",
        help="several models in one run, one file for each model and degree",
    )
    add(
        "--tp",
        type=_degrees,
        default=(),
        metavar="TP,...",
        help="degrees of models without their own: shards need one GPU, collectives --num-gpus",
    )
    add("--minutes", type=_minutes, default=10.0, help="time of the whole run (%(default)g)")
    add(
        "--parts",
        type=_parts,
        default=ALL_PARTS,
        metavar=",".join(ALL_PARTS),
        help="what to measure (default: all)",
    )
    add(
        "--calibrate",
        action="store_true",
        help="measure some rows of --profile again and say whether it fits this card",
    )
    add(
        "--errors",
        action="store_true",
        help="write into the README beside --profile how far co-runs are predicted off; no GPU",
    )
    add("--commit", default="", help="of the source, for new files (default: git's)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _degrees(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _buckets(text: str) -> tuple[int, ...]:
    if text == "main":
        return ()
    try:
        sizes = tuple(sorted({int(part) for part in _names(text)}))
        check_sizes(sizes)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if not sizes:
        raise argparse.ArgumentTypeError("must be main or sizes, e.g. 512,1024,2048")
    return sizes


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, but got {text}")
    return value


def _parts(text: str) -> tuple[str, ...]:
    parts = _names(text)
    unknown = [part for part in parts if part not in ALL_PARTS]
    if unknown or not parts:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(ALL_PARTS)}, but got {text!r}")
    return parts


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 2^32, but got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value
