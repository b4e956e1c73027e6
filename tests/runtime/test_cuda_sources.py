"""Every CUDA C++ kernel compiles for Hopper without a GPU, and spills no register."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings.nvrtc")

from nanoflow_tune.runtime.kernels.cubin import (
    KernelError,
    cache_folder,
    compile_cubin,
)
from nanoflow_tune.runtime.kernels.gemm_tiles import GemmTile
from nanoflow_tune.runtime.kernels.sm90_gemm import compiled

GEMM_TILES = [
    (GemmTile(rows=128, columns=256), False),
    (GemmTile(rows=128, columns=256), True),
    (GemmTile(rows=128, columns=136), False),
    (GemmTile(rows=128, columns=144), True),
    (GemmTile(rows=128, columns=96, cluster=2), True),
    (GemmTile(rows=128, columns=32), False),
    (GemmTile(rows=128, columns=32), True),
    (GemmTile(rows=128, columns=256, cluster=2), False),
    (GemmTile(rows=256, columns=176), False),
    (GemmTile(rows=128, columns=176, is_pingpong=True), False),
    (GemmTile(rows=128, columns=176, is_pingpong=True, cluster=2), True),
    (GemmTile(rows=256, columns=160), True),
    (GemmTile(rows=128, columns=256, is_split=True), False),
]


def assert_lean(log):
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log, "wgmma must not be serialised by the assembler"


@pytest.mark.parametrize(("tile", "has_silu"), GEMM_TILES, ids=str)
def test_gemm(tile, has_silu):
    assert_lean(compiled(tile, has_silu=has_silu).compile().log)


def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words():
    with pytest.raises(KernelError, match=r"gemm\.cu.*does not compile"):
        compile_cubin("gemm.cu", (("BLOCK_M", 128),))


def test_machine_code_is_kept_whole_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cubin.cache_clear()
    tile = GemmTile(rows=128, columns=64)
    first = compiled(tile, has_silu=False).compile()
    (kept,) = cache_folder().iterdir()
    assert kept.parent.is_relative_to(tmp_path)
    compile_cubin.cache_clear()
    assert compiled(tile, has_silu=False).compile() == first
    assert [*cache_folder().iterdir()] == [kept]
    compile_cubin.cache_clear()


def test_a_cache_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cubin.cache_clear()
    assert compiled(GemmTile(rows=128, columns=64), has_silu=False).compile().code
    compile_cubin.cache_clear()
