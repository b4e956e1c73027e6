"""Runs every CUDA C++ kernel under NVIDIA's compute-sanitizer; the exit code tells.

    python tests/gpu/sanitize.py                        memcheck, each kernel alone on one GPU
    python tests/gpu/sanitize.py --tool racecheck       shared memory; also synccheck, initcheck
    python tests/gpu/sanitize.py --num-gpus 2           collectives between two GPUs
    python tests/gpu/sanitize.py --plant                a fault on purpose: must end with 1

Exit codes: 0 clean, 1 the sanitizer found something, 2 the calls themselves failed, 3 the sanitizer
is missing or cannot run on this device. Memory is allocated tensor by tensor (no caching), so that
each access past a tensor shows. Errors that API calls return are not reported: torch and NCCL probe
what a driver can do by calls that may fail. Only this package's kernels are checked, by their exact
names; `initcheck` has to watch all of them, since torch's write the operands.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

KERNELS = ("gemm", "decode_attention", "one_shot", "two_shot", "add_received", "all_gather")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CLEAN, FOUND, FAILED, MISSING = 0, 1, 2, 3
_FOUND_CODE = 99
_CALLS = Path(__file__).with_name("sanitized_calls.py")
_REFUSALS = ("Device not supported", "Unable to find injection library")


def find_sanitizer(folders: Sequence[Path] | None = None) -> Path | None:
    """The program on PATH, else in a CUDA toolkit below /usr/local."""
    found = shutil.which("compute-sanitizer")
    if found and folders is None:
        return Path(found)
    bins = folders if folders is not None else sorted(Path("/usr/local").glob("cuda*/bin"))[::-1]
    places = [bin_folder / "compute-sanitizer" for bin_folder in bins]
    places += [bin_folder.parent / "compute-sanitizer" / "compute-sanitizer" for bin_folder in bins]
    return next((place for place in places if place.exists()), None)


def command_of(sanitizer: Path, tool: str, calls: Sequence[str]) -> list[str]:
    """The sanitizer's command line around `sanitized_calls.py` with some arguments."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(_FOUND_CODE)]
    options += ["--print-limit", "20"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    if tool != "initcheck":
        for name in KERNELS:
            options += ["--kernel-name", f"kernel_name={name}"]
    return [str(sanitizer), *options, sys.executable, str(_CALLS), *calls]


def verdict(return_code: int, output: str) -> int:
    """This script's exit code, from the sanitizer's and what was printed."""
    if any(refusal in output for refusal in _REFUSALS):
        return MISSING
    if return_code == _FOUND_CODE:
        return FOUND
    return CLEAN if return_code == 0 and "all calls are right" in output else FAILED


def main() -> int:
    """Run, show the sanitizer's output, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--plant", action="store_true", help="read past an allocation on purpose")
    given = parser.parse_args()
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is neither on PATH nor below /usr/local/cuda*: install the CUDA "
              "toolkit's sanitizer")  # fmt: skip
        return MISSING
    calls = ["--num-gpus", str(given.num_gpus), *(["--plant"] if given.plant else [])]
    command = command_of(sanitizer, given.tool, calls)
    print(" ".join(command), flush=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    code = verdict(process.returncode, "".join(lines))
    words = {CLEAN: "clean", FOUND: "ERRORS FOUND", FAILED: "the calls failed", MISSING: "not run"}
    print(f"{given.tool}, {given.num_gpus} GPU: {words[code]} (exit code {code})")
    return code


if __name__ == "__main__":
    sys.exit(main())
