"""Kernels over peers' memory alone on one GPU, and every CUDA C++ kernel under compute-sanitizer.

The command that the sanitizer is run with is tested without a device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import sanitize

torch = pytest.importorskip("torch")
SCRIPT = Path(sanitize.__file__)


def test_every_kernel_in_cuda_cpp_is_checked_by_name():
    import nanoflow_tune.runtime.kernels as package

    sources = sorted((Path(package.__file__).parent / "cuda").glob("*.cu"))
    text = "\n".join(source.read_text() for source in sources)
    names = re.findall(
        r'extern "C" __global__ void[^{]*?(\w+)\(\s*(?:const |Pack|uint|__grid)', text
    )
    assert text.count('extern "C" __global__') == len(names)
    assert sorted(names) == sorted(sanitize.KERNELS)


def test_memcheck_filters_kernels_and_leaves_api_probes_out():
    command = sanitize.command_of(Path("/x/compute-sanitizer"), "memcheck", ["--num-gpus", "2"])
    assert command[:3] == ["/x/compute-sanitizer", "--tool", "memcheck"]
    assert command[command.index("--report-api-errors") + 1] == "no"
    assert command.count("--kernel-name") == len(sanitize.KERNELS)
    assert command[-3].endswith("sanitized_calls.py")
    assert "--kernel-name" not in sanitize.command_of(Path("/x"), "initcheck", [])


@pytest.mark.parametrize(
    ("return_code", "output", "expected"),
    [
        (0, "all calls are right\n", sanitize.CLEAN),
        (0, "", sanitize.FAILED),
        (99, "all calls are right\n", sanitize.FOUND),
        (1, "AssertionError", sanitize.FAILED),
        (1, "========= Error: Device not supported", sanitize.MISSING),
    ],
)
def test_the_exit_code_tells_clean_found_failed_and_not_run(return_code, output, expected):
    assert sanitize.verdict(return_code, output) == expected


def test_the_sanitizer_of_a_toolkit_is_found_when_it_is_not_on_path(tmp_path):
    assert sanitize.find_sanitizer([tmp_path / "cuda" / "bin"]) is None
    program = tmp_path / "cuda" / "compute-sanitizer" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch()
    assert sanitize.find_sanitizer([tmp_path / "cuda" / "bin"]) == program


SHAPES = [(1, 8), (7, 264), (129, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_lone_rank_sums_in_rank_order_and_leaves_its_signals_down(
    algorithm, world_size, rank, shape
):
    from lone_rank import all_reduce_alone
    from sanitized_calls import check

    check(all_reduce_alone(algorithm, rank, world_size, *shape, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_a_lone_rank_writes_its_columns_everywhere_and_no_others(world_size, rank, shape):
    from lone_rank import all_gather_alone
    from sanitized_calls import check

    outcome, outputs = all_gather_alone(rank, world_size, *shape, 5)
    check(outcome)
    width = shape[1]
    for output in outputs:
        others = torch.cat([output[:, : rank * width], output[:, (rank + 1) * width :]], dim=1)
        assert bool(others.isnan().all())


def run_script(*arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == sanitize.MISSING:
        pytest.skip(done.stdout.splitlines()[-1])
    return done


@pytest.mark.gpu
def test_a_planted_read_past_an_allocation_is_found():
    done = run_script("--plant")
    assert done.returncode == sanitize.FOUND, done.stdout[-3000:]
    assert "add_received" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_no_kernel_is_caught(tool):
    done = run_script("--tool", tool)
    assert done.returncode == sanitize.CLEAN, done.stdout[-6000:]


@pytest.mark.gpu
def test_no_collective_between_two_gpus_is_caught():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = run_script("--num-gpus", "2")
    assert done.returncode == sanitize.CLEAN, done.stdout[-6000:]
