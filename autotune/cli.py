"""The command line: `nanoflow-tune --model llama2-70b` is the main job, verbs do its parts.

stderr shows progress; stdout holds a short table, the verdict, and one line of JSON last.

    0 done   1 crash   2 bad input   3 no feasible plan   4 verification failed   5 a GPU failed
    130 interrupted   141 the reader of the output is gone

Bad input includes what the file system refuses: a read-only folder, a full disk.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DONE, CRASH, BAD_INPUT, NO_PLAN, NOT_VERIFIED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 4, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parsed(argv)
    except KeyboardInterrupt:
        print("nanoflow-tune: interrupted before it did anything", file=sys.stderr)
        return INTERRUPTED
    if getattr(options, "json", False):
        os.environ.setdefault("NANOFLOW_NO_BARS", "--json")  # ranks get it too
    try:
        code = _COMMANDS[options.verb](options)
        sys.stdout.flush()  # here, where a reader that is gone is understood
        return code
    except KeyboardInterrupt:
        _say_interrupted(options)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):  # the latter by rich: the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        return PIPE_CLOSED
    except Exception as err:  # the boundary: every error becomes an exit code
        if options.debug:
            traceback.print_exc()
        return _explain(err, options.debug)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    from .cli_parser import NOT_OF_PAPER, build_parser  # slow enough to be interrupted

    parser = build_parser()
    _check_text(parser, sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)
    if options.paper:
        if any(getattr(options, name) != parser.get_default(name) for name in NOT_OF_PAPER):
            parser.error("--paper is LLaMA-2-70B on 8 x A100 80GB: give only --workload, --seed")
        options.verb = "paper"
    if options.verb is None and options.model is None:
        parser.error("--model is required; `nanoflow-tune models` lists what is shipped")
    return options


def _check_text(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse arguments that are no UTF-8: they go into plans and reports, which are."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            parser.error(f"arguments must be UTF-8 text, but got {argument!r}; rename the file")


def _tune(options: argparse.Namespace) -> int:
    if options.dry_run:
        return _dry_run(options)
    from .document import document
    from .tune import tune

    report = tune(_tune_options(options), _stderr())
    values = document(report)
    _show(values, Path(report.plan_path).parent, is_json_only=options.json)
    return NOT_VERIFIED if values["verified"] is False else DONE


def _dry_run(options: argparse.Namespace) -> int:
    from .dry_run import dry_run

    values = dry_run(_tune_options(options), _say)
    if not options.json:
        for name, value in values.items():
            if name != "dry_run" and value not in (None, []):
                lines = value if name == "reasons" else [value]
                text = f"\n{'':<20} ".join(map(str, lines))
                text = ", ".join(value) if name == "steps" else text
                print(f"{name.replace('_', ' '):<20} {text}")
    print(json.dumps(values, separators=(",", ":")))
    return DONE


def _tune_options(options: argparse.Namespace) -> Any:  # noqa: ANN401
    from .job import TuneOptions

    return TuneOptions(
        model=options.model,
        gpu=options.gpu,
        num_gpus=options.num_gpus,
        workload=options.workload,
        profile=options.profile,
        output_dir=options.output_dir,
        effort=options.effort,
        seed=options.seed,
        buckets=options.buckets,
        command=" ".join(["nanoflow-tune", *sys.argv[1:]]),
        is_search_only=options.verb == "search",
        allows_host_planned=options.host_planned,
        is_resumed=options.resume,
        storage=options.storage,
    )


def _profile(options: argparse.Namespace) -> int:
    from .profile_command import profile

    values = profile(options, " ".join(["nanoflow-tune", *sys.argv[1:]]), _say)
    print(json.dumps(values, separators=(",", ":")))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from ..profiler.progress import bar
    from .verification import verify_file

    with bar(_stderr(), f"verifying {options.plan}, batches") as advance:
        values = verify_file(options.plan, options.model, options.seed, _say, advance)
    if not options.json:
        for record in values["verification"]:
            print(
                f"{record['plan']} passed: {record['model']}, {record['num_layers']} layers, "
                f"{record['num_ranks']} rank(s) on {record['device']}, largest error "
                f"{record['max_relative_error']:.1e} of {record['tolerance']:.0e}, "
                f"{record['orders_checked']} orders"
            )
    print(json.dumps(values, separators=(",", ":")))
    return DONE


def _report(options: argparse.Namespace) -> int:
    from ..search_spaces.whole_file import write_whole
    from .html import render
    from .output_folder import DOCUMENT, FILES, read_document

    if options.other is not None:
        return _compare(options)
    values = read_document(options.folder)
    pictures = (options.folder / name for name in FILES if name.endswith(".png"))
    images = {path.stem: path.read_bytes() for path in pictures if path.exists()}
    try:
        page = render(values, images)
        write_whole(options.folder / "report.html", page)
        _show(values, options.folder, is_json_only=options.json)
    except (KeyError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as err:
        raise ValueError(
            f"{options.folder / DOCUMENT} lacks or misshapes {err}; run the job again"
        ) from err
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from .compare_command import compare_paths
    from .comparison_page import difference_lines, table

    values = compare_paths(options.folder, options.other, options.output_dir)
    if not options.json:
        stdout = _stdout()
        stdout.print(table(values))
        for text in (*difference_lines(values), *values["warnings"], values["verdict"]):
            stdout.print(text, markup=False, highlight=False)
        stdout.print(f"page: {values['output']}/compare.html", markup=False, highlight=False)
    short = {key: held for key, held in values.items() if key not in ("facts", "schedules")}
    print(json.dumps(short, separators=(",", ":")))
    return DONE


def _paper(options: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table

    from ..profiler.progress import clock
    from .paper_mode import paper_document, paper_rows, run_paper

    with clock(_stderr(), "searching"):
        result = run_paper(options.workload, seed=options.seed, on_progress=_say)
    if not options.json:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column(f"LLaMA-2-70B, 8 x A100 80GB, {result.workload}")
        for heading in ("ms/iteration", "tokens/s/GPU"):
            table.add_column(heading, justify="right")
        for row in paper_rows(result):
            table.add_row(*row)
        _stdout().print(table)
    print(json.dumps(paper_document(result), separators=(",", ":")))
    return DONE


def _models(options: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table

    from ..search_spaces.loader import known, load_hardware, load_model
    from .capacity import DoesNotFitError, num_gpus_default

    hardware = load_hardware(options.gpu)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("model")
    for heading in ("parameters", "weights", "layers", f"GPUs ({hardware.name})"):
        table.add_column(heading, justify="right")
    for name in known("models"):
        model = load_model(name)
        try:
            gpus = str(num_gpus_default(model, hardware))
        except DoesNotFitError:
            gpus = "does not fit"
        table.add_row(
            name,
            _large(model.num_parameters, "B"),
            _large(model.weight_bytes, "GB"),
            str(model.num_hidden_layers),
            gpus,
        )
    kinds = {kind: known(kind) for kind in ("models", "hardware", "workloads", "spaces")}
    if not options.json:
        stdout = _stdout()
        stdout.print(table)
        for kind in ("hardware", "workloads"):
            stdout.print(f"{kind}: {', '.join(kinds[kind])}", highlight=False)
    print(json.dumps(kinds, separators=(",", ":")))
    return DONE


def _large(number: float, billion: str) -> str:
    """Three digits in billions, in millions below one."""
    if number >= 1e9:
        return f"{number / 1e9:.3g} {billion}"
    return f"{number / 1e6:.3g} {'M' + billion[1:]}"


def _export(options: argparse.Namespace) -> int:
    from .export_command import export

    values = export(options, _say)
    if options.json or options.output:
        print(json.dumps(values, separators=(",", ":")))
    return DONE


def _bench(options: argparse.Namespace) -> int:
    from .bench_command import bench
    from .bench_table import table

    values = bench(options, _say)  # rank 0 draws how far it is
    if not options.json:
        stdout = _stdout()
        stdout.print(table(values))
        if "optimal" in values["peaks"]:
            stdout.print(f"% sustained: {values['peaks']['optimal']['source']}", highlight=False)
        for remark in values["remarks"]:
            stdout.print(remark, markup=False, highlight=False)
    print(json.dumps(values, separators=(",", ":")))
    return DONE


def _check_env(options: argparse.Namespace) -> int:
    from .check_env import check_env, table

    values = check_env()
    if not options.json:
        stdout = _stdout()
        stdout.print(table(values))
        stdout.print(values["summary"], markup=False, highlight=False)
    print(json.dumps(values, separators=(",", ":")))
    return DONE


_COMMANDS = {
    None: _tune,
    "search": _tune,
    "profile": _profile,
    "verify": _verify,
    "report": _report,
    "models": _models,
    "export": _export,
    "check-env": _check_env,
    "bench": _bench,
    "paper": _paper,
}


def _show(values: dict[str, Any], folder: Path, *, is_json_only: bool) -> None:
    from .document import json_line, race_table

    if not is_json_only:
        stdout = _stdout()
        stdout.print(race_table(values))
        book = (values.get("book") or {}).get("sentence", "")
        for text in filter(None, (values["verdict"], book, values["next_step"])):
            stdout.print(text, markup=False, highlight=False)
        stdout.print(f"report: {folder}/report.html", markup=False, highlight=False, soft_wrap=True)
    print(json_line(values), flush=True)


def _stdout() -> Any:  # noqa: ANN401
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100)


def _stderr() -> Any:  # noqa: ANN401
    from rich.console import Console

    return Console(stderr=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _explain(err: Exception, is_debug: bool) -> int:
    """Say on stderr what went wrong; returns the exit code that it means."""
    code = _exit_code(err)
    if code != CRASH:
        print(f"nanoflow-tune: error: {_refusal(err) or err}", file=sys.stderr)
        return code
    print(f"nanoflow-tune: crashed: {type(err).__name__}: {err}", file=sys.stderr)
    if not is_debug:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nanoflow-tune-", suffix=".txt", delete=False, encoding="utf-8"
        ) as log:
            traceback.print_exception(err, file=log)
        print(f"the traceback is in {log.name}; --debug shows it here", file=sys.stderr)
    return code


def _exit_code(err: Exception) -> int:
    from ..runtime.gpu_failures import GPU_FAILED, GpuFailureError
    from ..runtime.verify import VerificationError
    from .tune import NoFeasiblePlanError

    if isinstance(err, VerificationError):
        return NOT_VERIFIED
    if isinstance(err, GpuFailureError):
        return GPU_FAILED
    if isinstance(err, NoFeasiblePlanError):
        return NO_PLAN
    return BAD_INPUT if isinstance(err, ValueError) or _refusal(err) else CRASH


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DATABASE_FULL = ("database or disk is full", "disk I/O error")
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOLCK),
)


def _refusal(err: Exception) -> str:
    """What the file system refused and what helps, "" for any other error."""
    cause: BaseException | None = err  # Optuna wraps what SQLite says
    while cause is not None and not any(text in str(cause) for text in _DATABASE_FULL):
        cause = cause.__cause__
    if cause is not None:
        return "no space is left for the search's database; free some, or name another --output-dir"
    if not isinstance(err, OSError):
        return ""
    where = f"{err.filename}: " if err.filename else ""
    if err.errno in _DISK_FULL:
        return f"{where}{err.strerror}; free some space, or name another folder to write to"
    if err.errno in _REFUSED and where:
        return f"{where}{err.strerror}; check the path and its permissions, or name another"
    return ""


def _say_interrupted(options: argparse.Namespace) -> None:
    if options.verb == "profile":
        text = "measured rows are kept; the same command goes on where it stopped"
    elif options.verb in (None, "search"):
        text = (
            "earlier results are untouched, what was measured and what is finished of the search "
            "and of the plan book is kept; run the same command again"
        )
    else:
        text = "nothing was changed; run the same command again"
    start = "\n" if sys.stderr.isatty() else ""  # a bar that a rank drew may stand there
    print(f"{start}nanoflow-tune: interrupted: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
