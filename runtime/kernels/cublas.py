"""cuBLAS GEMM told how many SMs it may fill.

Untold, cuBLAS sizes its grid for the whole GPU and runs a second, nearly empty wave inside a
partition (measured: results/README.md). `cublasSetSmCountTarget` on torch's handle changes its
heuristic; torch's own SM carve-out option does not reach `torch.mm`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .registry import register


@functools.cache
def _library() -> ctypes.CDLL:
    """The cuBLAS that torch has loaded into this process."""
    torch.cuda.current_blas_handle()
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 - a kernel file
        paths = {line.split()[-1] for line in maps if "libcublas.so" in line}
    if not paths:
        raise RuntimeError("cuBLAS is not loaded in this process: is this a CUDA build of torch?")
    return ctypes.CDLL(sorted(paths)[0])


@functools.cache
def _device_sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _set_sm_target(num_sms: int) -> None:
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    status = _library().cublasSetSmCountTarget(handle, ctypes.c_int(num_sms))
    if status != 0:
        raise RuntimeError(f"cublasSetSmCountTarget({num_sms}) failed with status {status}")


@register("gemm", "cublas", "cuda")
def cublas_gemm(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
) -> None:
    """out_TN = x_TK @ weight_NK^T (+ bias_N)."""
    is_share = num_sms != _device_sms(x_TK.device.index)
    if is_share:
        _set_sm_target(num_sms)
    if bias_N is None:
        torch.mm(x_TK, weight_NK.t(), out=out_TN)
    else:
        torch.addmm(bias_N, x_TK, weight_NK.t(), out=out_TN)
    if is_share:
        _set_sm_target(0)
