"""Runs the command line in this process and holds it to what it promises of bad input."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
from pathlib import Path

from mutations import CANARY

from nanoflow_tune.autotune import cli

GUARD_S = 60
"""Far more than any of these takes; what runs longer hangs."""
REFUSALS = (cli.BAD_INPUT, cli.NO_PLAN, cli.NOT_VERIFIED)


@contextlib.contextmanager
def empty_folder():
    """A new working folder, and a guard against hanging."""
    before = Path.cwd()

    def hang(*_):
        raise AssertionError(f"still running after {GUARD_S} s")

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        os.chdir(name)
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(GUARD_S)
        try:
            yield Path(name)
        finally:
            signal.alarm(0)
            os.chdir(before)


def run(arguments):
    """Exit code, stdout and stderr; no traceback, and every refusal says why."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    said = err.getvalue()
    assert code in (cli.DONE, *REFUSALS), f"exit {code}: {said[-1500:]}"
    assert "Traceback" not in said
    if code != cli.DONE:
        assert "error: " in said, said
        assert len(said.rsplit("error: ", 1)[1]) > 12, said
    assert not Path(CANARY).exists()
    return code, out.getvalue(), said
