"""Compiles CUDA C++ for Hopper by NVRTC: no compiler on the user's machine, no GPU needed.

A kernel is a `.cu` file in `cuda/`, macro definitions and generated headers. What was compiled is
kept in the user's cache folder under a hash of everything that went into it, so that the next
process (profiles and benchmarks start many) loads it in a millisecond instead of half a second.
NVRTC comes through `cuda.bindings`; torch's CUDA wheels bring its library.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..cuda_driver import checked, nvrtc

ARCHITECTURE = "sm_90a"
"""Hopper with wgmma and setmaxnreg."""
_SOURCES = Path(__file__).parent / "cuda"


class KernelError(RuntimeError):
    """A CUDA kernel does not compile."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code of one kernel and what the assembler said (registers, spills)."""

    code: bytes
    log: str


@functools.cache
def compile_cubin(
    file: str,
    definitions: tuple[tuple[str, str | int], ...],
    generated: tuple[tuple[str, str], ...] = (),
) -> Cubin:
    """Compile `cuda/<file>` for Hopper, or take it from the cache folder.

    Args:
        file: a `.cu` file.
        definitions: macros.
        generated: names and texts of headers that are not files.

    Raises:
        KernelError: the source does not compile; the message is the compiler's.
    """
    headers = {header.name: header.read_text() for header in sorted(_SOURCES.glob("*.cuh"))}
    headers.update(generated)
    source = (_SOURCES / file).read_text()
    options = [f"-arch={ARCHITECTURE}", "-std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in definitions]
    version = checked(nvrtc().nvrtcVersion(), "asking for the compiler's version")
    inputs = repr((version, source, sorted(headers.items()), options))
    kept = cache_folder() / f"{Path(file).stem}-{hashlib.sha256(inputs.encode()).hexdigest()[:32]}"
    found = _read(kept)
    if found is None:
        found = _compile(file, source, headers, options)
        _keep(found, kept)
    return found


def cache_folder() -> Path:
    """Where machine code is kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanoflow-tune" / "cubins"


def _compile(file: str, source: str, headers: dict[str, str], options: list[str]) -> Cubin:
    compiler = nvrtc()
    program = checked(
        compiler.nvrtcCreateProgram(
            source.encode(),
            file.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        ),
        f"reading {file}",
    )
    error = compiler.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    size = checked(compiler.nvrtcGetProgramLogSize(program), "reading the compiler's log")
    log = b" " * size
    checked(compiler.nvrtcGetProgramLog(program, log), "reading the compiler's log")
    text = log.rstrip(b"\0 ").decode(errors="replace")
    if int(error) != 0:
        macros = " ".join(option for option in options if option.startswith("-D"))
        raise KernelError(f"{file} with {macros} does not compile:\n{text}")
    size = checked(compiler.nvrtcGetCUBINSize(program), "reading the machine code")
    code = b" " * size
    checked(compiler.nvrtcGetCUBIN(program, code), "reading the machine code")
    compiler.nvrtcDestroyProgram(program)
    return Cubin(code, text)


def _read(kept: Path) -> Cubin | None:
    """What was kept; its log ends the file, behind the code's length and the code."""
    try:
        data = kept.read_bytes()
    except OSError:
        return None
    size = int.from_bytes(data[:8], "little")
    return Cubin(data[8 : 8 + size], data[8 + size :].decode())


def _keep(cubin: Cubin, kept: Path) -> None:
    """Write all or nothing; a folder that cannot be written only costs the next process time."""
    data = len(cubin.code).to_bytes(8, "little") + cubin.code + cubin.log.encode()
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(kept)
