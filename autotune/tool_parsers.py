"""Verbs around the job: what is exported, compared and checked, with examples in their help."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .ablation import BOOKS
from .export_facts import PDMUX_DEFAULT_GROUPS

TARGETS = ("sglang", "vllm", "schema")
DEFAULT_TPOT_MS = 50.0
LISTS = {"models": "models", "gpus": "hardware", "workloads": "workloads"}
"""Folder of search_spaces/ behind each --list flag."""
_EXAMPLES = {
    "": (
        "--model llama3-8b",
        "--model ./my-model/config.json --num-gpus 2 --workload 1024/256",
        "--model llama2-70b --dry-run",
    ),
    "search": (
        "--model llama3-8b --effort full",
        "--model llama3-8b --gpu h100 --profile roofline --buckets main",
    ),
    "profile": (
        "--model llama3-8b --minutes 5",
        "--models llama3-8b,llama2-70b@2 --minutes 20",
        "--model llama3-8b --calibrate",
    ),
    "verify": ("plan.yaml", "plan.yaml --model ./my-model"),
    "models": ("", "--gpu h100"),
}
"""What to write behind each verb, "" the main job; the other verbs bring their own."""
SCHEDULES = ("winner", "sequential", "best_overlapped")


def add_tool_parsers(parser: argparse.ArgumentParser, verbs: Any) -> None:  # noqa: ANN401
    """Add lists and dry runs to the command line, and the verbs around the job.

    Args:
        parser: of the main job.
        verbs: its sub-parsers, to which argparse gives no public name.
    """
    for kind, folder in LISTS.items():
        parser.add_argument(
            f"--list-{kind}",
            action=_ListNames,
            nargs=0,
            const=folder,
            help=f"print the shipped {kind}, one a line, and exit",
        )
    for job in (parser, verbs.choices["search"]):
        job.add_argument(
            "--dry-run",
            action="store_true",
            help="check the input, say what would be done and where, and exit",
        )
        job.add_argument(
            "--resume",
            action="store_true",
            help="go on with an interrupted run, and refuse where there is none (without the flag "
            "the same command goes on with what it finds)",
        )
        job.add_argument(
            "--storage",
            metavar="URL",
            help="keep and share the trials there: sqlite:///FILE, journal:FILE or another "
            "SQLAlchemy URL (default: search.db in the output folder)",
        )
    for verb, arguments in _EXAMPLES.items():
        described = verbs.choices[verb] if verb else parser
        lines = (f"  {' '.join(filter(None, (parser.prog, verb, text)))}" for text in arguments)
        examples = "\n".join(("examples:", *lines))
        described.formatter_class = argparse.RawDescriptionHelpFormatter
        described.epilog = "\n\n".join(filter(None, [examples, described.epilog]))
    _add_report(verbs)
    _add_export(verbs)
    _add_check_env(verbs)
    _add_bench(verbs)


class _ListNames(argparse.Action):
    """Prints the names of a folder of shipped specs and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from ..search_spaces.loader import known

        print("\n".join(known(self.const)))
        parser.exit()


def _add_report(verbs: Any) -> None:  # noqa: ANN401
    parser = verbs.add_parser(
        "report",
        help="show the result in a folder and render its page anew, or compare two of them",
        description="With one folder: show its result and render its page anew. With two plans or "
        "folders: set them side by side, on the screen and in compare.html and compare.json.",
        epilog="examples:\n"
        "  nanoflow-tune report nanoflow-out/llama3-8b-h200-512-512-tp1\n"
        "  nanoflow-tune report before/plan.yaml after/plan.yaml --output-dir compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="A", help="a job's folder, or a plan file")
    parser.add_argument("other", type=Path, metavar="B", nargs="?", help="what to set beside A")
    parser.add_argument(
        "--output-dir", type=Path, help="of the comparison (default: nanoflow-out/compare)"
    )
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_export(verbs: Any) -> None:  # noqa: ANN401
    parser = verbs.add_parser(
        "export",
        help="write a plan as arguments of SGLang or vLLM, or the JSON Schema of plans",
        description="Write a plan in the words of another engine. Every export names the "
        "decisions that the engine cannot express and the predicted gain that is lost.",
        epilog="examples:\n"
        "  nanoflow-tune export --to sglang plan.yaml --tpot-ms 30 --output plan.pdmux.yaml\n"
        "  nanoflow-tune export --to vllm plan.yaml\n"
        "  nanoflow-tune export --to schema > plan.schema.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("plan", type=Path, nargs="?", metavar="PLAN.yaml", help="not needed for schema")
    add("--to", required=True, choices=TARGETS)
    add("--output", type=Path, metavar="FILE", help="default: standard output")
    add("--model", help="the model's spec, where its name alone is not known")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="winner",
        help="whose decisions are weighed in the lossy block (%(default)s)",
    )
    add(
        "--profile",
        default="shipped",
        metavar="shipped|roofline|PATH",
        help="sglang: where the curves of prefill and decode come from (%(default)s)",
    )
    add(
        "--tpot-ms",
        type=float,
        metavar="MS",
        help=f"sglang: limit on the time per token (default {DEFAULT_TPOT_MS:g}, and said so)",
    )
    add(
        "--sm-groups",
        type=int,
        default=PDMUX_DEFAULT_GROUPS,
        metavar="N",
        help="sglang: SM groups at most; each costs a set of CUDA graphs (%(default)s)",
    )
    add("--json", action="store_true", help="print one JSON line instead of the file's text")
    add("--debug", action="store_true", help="show tracebacks")


def _add_check_env(verbs: Any) -> None:  # noqa: ANN401
    parser = verbs.add_parser(
        "check-env",
        help="say what this machine has, and which parts of the tool work on it",
        description="Look at GPUs, driver, SM partitions, links, power cap, clocks, free memory "
        "and libraries, and say what works and what to do about the rest. Changes no setting; "
        "exits with 0 also where there is no GPU.",
        epilog="examples:\n  nanoflow-tune check-env\n  nanoflow-tune check-env --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_bench(verbs: Any) -> None:  # noqa: ANN401
    parser = verbs.add_parser(
        "bench",
        help="serve a plan offline with this engine: tokens/s, joules, percent of optimal",
        description="Serve all requests of a workload with a plan's books in interleaved rounds. "
        "Without the plan's GPUs a scaled-down model runs on the CPU, and says so.",
        epilog="examples:\n"
        "  nanoflow-tune bench plan.yaml\n"
        "  nanoflow-tune bench plan.yaml --books sequential,nano_only,overlapped,winner "
        "--rounds 3\n"
        "  nanoflow-tune bench plan.yaml --workload sharegpt --weights ./llama3-8b\n"
        "  nanoflow-tune bench plan.yaml --workload sharegpt --rate 40\n"
        "  nanoflow-tune bench plan.yaml --requests 2048 --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN.yaml")
    add("--workload", default="512/512", help="mean PROMPT/DECODE tokens, or a name (%(default)s)")
    add("--trace", type=Path, metavar="CSV", help="lengths of ContextTokens, GeneratedTokens")
    add("--requests", type=_positive, metavar="N", help="default: 2048 on GPUs, 64 on a CPU")
    add(
        "--books",
        default="sequential,winner",
        metavar="BOOK,...",
        help=f"of {', '.join(BOOKS)} (%(default)s)",
    )
    add("--rounds", type=_positive, default=1, metavar="N", help="runs of each book (%(default)s)")
    add("--weights", default="random", metavar="DIR|random[:SEED]", help="(%(default)s)")
    add("--model", help="the model of random weights (default: the plan's)")
    add("--max-model-len", type=_positive, help="longer requests are cut, or left out of a trace")
    add("--num-pages", type=_positive, help="of the KV cache (default: what fits)")
    add(
        "--rate",
        type=_rate,
        metavar="REQUESTS/S",
        help="send requests when they are due, Poisson or as in a trace's TIMESTAMPs at this mean "
        "rate, and tell latencies (default: all at once)",
    )
    add("--dense-batch", type=_positive, metavar="ROWS", help="constant one (the plan's own)")
    add("--dry-run", action="store_true", help="predict steps and time on the plan's GPUs; no run")
    add(
        "--profile",
        default="shipped",
        metavar="shipped|PATH",
        help="where the sustained GEMM peak is from (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of the lengths (%(default)s)")
    add("--json", action="store_true", help="only the JSON line on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be positive and finite, but got {value:g}")
    return value
