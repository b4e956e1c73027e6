from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_functions as on_rank

from nanoflow_tune.runtime.gpu_failures import OutOfMemoryError
from nanoflow_tune.runtime.launch import LostRankError, RankError, RankGroup
from nanoflow_tune.runtime.verify import VerificationError


def test_ranks_answer_in_order_keep_state_and_reduce():
    with RankGroup(3) as ranks:
        assert ranks.call(on_rank.count_calls, 2) == [(0, 2), (1, 2), (2, 2)]
        assert ranks.call(on_rank.count_calls, 3) == [(0, 5), (1, 5), (2, 5)]
        assert ranks.call(on_rank.sum_of_ranks) == [6.0, 6.0, 6.0]
        bits = ranks.call(on_rank.rank_order_sum, 8)
        assert len({whole for whole, _ in bits} | {parts for _, parts in bits}) == 1


def test_errors_keep_their_type_name_the_rank_and_leave_the_ranks_usable():
    with RankGroup(2) as ranks:
        with pytest.raises(ValueError, match="planted on rank 1") as caught:
            ranks.call(on_rank.fail_on, 1, "value")
        assert "on rank 1" in caught.value.__notes__[0]
        assert "Traceback" in caught.value.__notes__[0]
        with pytest.raises(VerificationError, match="planted on rank 0"):
            ranks.call(on_rank.fail_on, 0, "verification")
        with pytest.raises(RankError, match="rank 1: KeyError"):
            ranks.call(on_rank.fail_on, 1, "other")
        assert ranks.call(on_rank.sum_of_ranks) == [3.0, 3.0]


def test_a_rank_that_dies_ends_all_and_is_named():
    with RankGroup(2) as ranks:
        with pytest.raises(RankError, match=r"rank 1: the process died with exit code 7"):
            ranks.call(on_rank.die_on, 1)
        with pytest.raises(RankError, match="not running"):
            ranks.call(on_rank.sum_of_ranks)


def test_a_rank_that_hangs_ends_all_and_is_named():
    with RankGroup(2, timeout_s=15.0) as ranks:
        ranks.timeout_s = 1.0
        with pytest.raises(RankError, match=r"no answer from rank 1 within 1 s"):
            ranks.call(on_rank.hang_on, 1)


def test_a_rank_killed_inside_a_collective_is_named_and_not_the_others_complaint():
    with RankGroup(3) as ranks:
        processes = ranks.call(on_rank.process_id)
        began_s = time.monotonic()
        with pytest.raises(LostRankError, match=r"^rank 1: the process died by SIGKILL") as caught:
            ranks.call(on_rank.kill_on, 1)
        assert time.monotonic() - began_s < 15
        assert "host memory" in str(caught.value)
        assert not any(map(_is_alive, processes))


def test_a_rank_without_memory_ends_those_that_wait_for_it():
    with RankGroup(2) as ranks:
        processes = ranks.call(on_rank.process_id)
        with pytest.raises(OutOfMemoryError) as caught:
            ranks.call(on_rank.run_out_on, 1)
        assert "no memory for `run_out_on`: 2.00 GiB were asked for" in str(caught.value)
        assert "--num-gpus" in str(caught.value)
        assert "on rank 1" in caught.value.__notes__[0]
        assert not any(map(_is_alive, processes))


def test_a_rank_that_never_comes_to_a_collective_is_told_from_the_one_that_waits():
    with RankGroup(2, timeout_s=60.0) as ranks:
        processes = ranks.call(on_rank.process_id)
        ranks.timeout_s = 2.0
        with pytest.raises(LostRankError, match=r"no answer from rank 0, 1 within 2 s") as caught:
            ranks.call(on_rank.stay_away_on, 1)
        told = str(caught.value)
        assert re.search(r"rank 0 was in \w+ \(\w+\.py:\d+\), from sum_of_ranks", told)
        assert re.search(r"rank 1 was in stay_away_on \(rank_functions\.py:\d+\)", told)
        assert not any(map(_is_alive, processes))


def test_fewer_than_one_rank_is_refused():
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        RankGroup(0)


def test_parent_modules_import_no_torch():
    code = (
        "import sys, nanoflow_tune.runtime.launch, nanoflow_tune.runtime.verify, "
        "nanoflow_tune.runtime.plan_io, nanoflow_tune.runtime.server; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    """A killed profile run must not go on writing behind the one that resumes it."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from nanoflow_tune.runtime.launch import RankGroup\n"
        "def pid(ctx):\n"
        "    return os.getpid()\n"
        "def hang(ctx):\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    with RankGroup(1) as ranks:\n"
        "        print(ranks.call(pid)[0], flush=True)\n"
        "        ranks.call(hang)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    rank_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _is_alive(rank_pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(rank_pid)


def _is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
