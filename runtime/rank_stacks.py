"""What a rank that does not answer is doing: its Python stack, asked for from outside.

A rank that waits inside a collective, or for the GPU, runs no Python; the handler of
`faulthandler` writes the stack all the same. So the parent can tell which rank waits in the
collective and which one never came to it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_ASK = signal.SIGUSR1
_WAIT_S = 1.0
_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<name>.*)$')
_open_files: list[TextIO] = []
"""The handler writes to a file descriptor: its file must not be collected."""


def watch_stack(file: Path) -> None:
    """Write this process's stacks to the file whenever it is asked, from now on."""
    handle = file.open("w", encoding="utf-8")
    handle.write(f"{threading.main_thread().ident:#018x}\n")
    handle.flush()
    faulthandler.register(_ASK, file=handle, all_threads=True)
    _open_files.append(handle)


def place_told(pid: int | None, file: Path) -> str:
    """Where the main thread of a process is, "" when it does not say.

    Returns:
        `all_reduce (distributed_c10d.py:3170), from sum_up (iteration.py:20)`: the innermost
        function, and the innermost one that is not PyTorch's.
    """
    if pid is None or not file.exists():
        return ""  # not started far enough: the signal would end it
    with suppress(OSError):
        before = file.stat().st_size
        os.kill(pid, _ASK)
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline and file.stat().st_size == before:
            time.sleep(0.05)
        time.sleep(0.05)  # the rest of the stacks
        return _innermost(file.read_text("utf-8", errors="replace"))
    return ""


def _innermost(text: str) -> str:
    lines = text.splitlines()
    main = lines[0] if lines else ""
    frames: list[re.Match[str]] = []
    is_main = False
    for line in lines[1:]:
        if "(most recent call first)" in line:
            is_main = bool(main) and main in line
            if is_main:
                frames.clear()
        elif is_main and (frame := _FRAME.match(line)):
            frames.append(frame)
    if not frames:
        return ""
    ours = next((frame for frame in frames if "/torch/" not in frame["path"]), frames[0])
    told = _named(frames[0])
    return told if ours is frames[0] else f"{told}, from {_named(ours)}"


def _named(frame: re.Match[str]) -> str:
    return f"{frame['name']} ({Path(frame['path']).name}:{frame['line']})"
