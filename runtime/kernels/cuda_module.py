"""CUDA C++ kernels without a compiler on the user's machine: NVRTC, tensor maps, launches.

A kernel is a `.cu` file in `cuda/` plus macro definitions. `compile_cubin` needs no GPU, so that a
machine without one can check that every variant compiles and spills nothing. `CudaKernel` loads the
cubin into the current context on first use and launches it on torch's current stream; arguments are
ctypes scalars, tensors (their address) and `TensorMap`s (by value, for TMA).

NVRTC and the driver come through `cuda.bindings`; torch's CUDA wheels bring the NVRTC library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURE = "sm_90a"
"""Hopper with wgmma and setmaxnreg."""
_SOURCES = Path(__file__).parent / "cuda"
_MAX_STATIC_SHARED_BYTES = 48 << 10


class KernelError(RuntimeError):
    """A CUDA kernel does not compile, load or launch."""


def _checked(result: tuple[Any, ...], what: str) -> Any:  # noqa: ANN401 - driver handles
    error, *values = result
    if int(error) != 0:
        raise KernelError(f"{what} failed: {error}")
    return values[0] if len(values) == 1 else tuple(values)


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
    """Compile `cuda/<file>` for Hopper; needs no GPU.

    Args:
        file: a `.cu` file.
        definitions: macros.
        generated: names and texts of headers that are not files.

    Raises:
        KernelError: the source does not compile; the message is the compiler's.
    """
    from cuda.bindings import nvrtc

    headers = {header.name: header.read_text() for header in sorted(_SOURCES.glob("*.cuh"))}
    headers.update(generated)
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (_SOURCES / file).read_bytes(),
            file.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        ),
        f"reading {file}",
    )
    options = [f"-arch={ARCHITECTURE}", "-std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in definitions]
    error = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    size = _checked(nvrtc.nvrtcGetProgramLogSize(program), "reading the compiler's log")
    log = b" " * size
    _checked(nvrtc.nvrtcGetProgramLog(program, log), "reading the compiler's log")
    text = log.rstrip(b"\0 ").decode(errors="replace")
    if int(error) != 0:
        raise KernelError(f"{file} with {dict(definitions)} does not compile:\n{text}")
    size = _checked(nvrtc.nvrtcGetCUBINSize(program), "reading the machine code")
    code = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, code), "reading the machine code")
    nvrtc.nvrtcDestroyProgram(program)
    return Cubin(code, text)


class TensorMap(ctypes.Structure):
    """A TMA descriptor (CUtensorMap), passed to a kernel by value as `__grid_constant__`."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


@functools.lru_cache(maxsize=4096)
def _encode(
    address: int,
    itemsize: int,
    sizes: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_bytes: int,
    l2_promotion_bytes: int,
) -> bytes:
    from cuda.bindings import driver

    data_types = {
        2: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    swizzles = {
        0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
    }
    promotions = {
        0: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        64: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        128: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        256: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            data_types[itemsize],
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides_bytes],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in sizes],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles[swizzle_bytes],
            promotions[l2_promotion_bytes],
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"a tensor map of sizes {sizes}, strides {strides_bytes} bytes, box {box}",
    )
    return ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap))


def tensor_map(
    tensor: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int = 128,
    l2_promotion_bytes: int = 256,
) -> TensorMap:
    """A TMA view of a tensor's memory; elements outside are read as zero and never written.

    Args:
        tensor: gives address and element type (bf16 or fp32).
        sizes: extents, innermost first.
        strides: of every dimension but the innermost, in elements; multiples of 16 bytes.
        box: extents of one copy, innermost first, at most 256 each.
        swizzle_bytes: 0, 64 or 128; the innermost box extent spans at most that many bytes.
        l2_promotion_bytes: 0, 64, 128 or 256; what L2 fetches at least from memory.
    """
    size = tensor.element_size()
    encoded = _encode(
        tensor.data_ptr(),
        size,
        tuple(sizes),
        tuple(stride * size for stride in strides),
        tuple(box),
        swizzle_bytes,
        l2_promotion_bytes,
    )
    return TensorMap.from_buffer_copy(encoded)


class CudaKernel:
    """One compiled kernel: `extern "C" __global__ void <name>` of a file in `cuda/`."""

    def __init__(
        self,
        file: str,
        name: str,
        definitions: Mapping[str, str | int],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self._name = file, name
        self._definitions = tuple(sorted(definitions.items()))
        self._headers = tuple(sorted((headers or {}).items()))
        self._functions: dict[int, Any] = {}

    def compile(self) -> Cubin:
        """The machine code; compiled once per process."""
        return compile_cubin(self._file, self._definitions, self._headers)

    def _function(self, shared_bytes: int) -> Any:  # noqa: ANN401 - driver handle
        from cuda.bindings import driver

        device = torch.cuda.current_device()
        if device not in self._functions:
            library = _checked(
                driver.cuLibraryLoadData(self.compile().code, [], [], 0, [], [], 0),
                f"loading {self._file}",
            )
            kernel = _checked(
                driver.cuLibraryGetKernel(library, self._name.encode()), f"finding {self._name}"
            )
            # The function of the primary context also runs in green contexts' streams.
            function = _checked(driver.cuKernelGetFunction(kernel), f"finding {self._name}")
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if shared_bytes > _MAX_STATIC_SHARED_BYTES:
                _checked(
                    driver.cuFuncSetAttribute(function, limit, shared_bytes),
                    f"{shared_bytes} bytes of shared memory for {self._name}",
                )
            self._functions[device] = function
        return self._functions[device]

    def launch(
        self,
        grid: tuple[int, int, int],
        num_threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        cluster: int = 1,
        *,
        overlaps_previous: bool = False,
    ) -> None:
        """Launch on torch's current stream.

        Args:
            grid: blocks.
            num_threads: threads of a block.
            shared_bytes: dynamic shared memory of a block, the same in every launch.
            arguments: tensors, `TensorMap`s and ctypes scalars, in the kernel's order.
            cluster: blocks of a cluster along x; divides the grid.
            overlaps_previous: start while the kernel before drains (programmatic dependent launch);
                only for kernels that call `wait_for_previous_kernel`.

        Raises:
            KernelError: the driver refuses.
        """
        from cuda.bindings import driver

        torch.cuda.current_stream()  # makes the primary context current on this thread
        function = self._function(shared_bytes)
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes: list[Any] = []
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = 1
            attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        if overlaps_previous:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        _checked(
            driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0),
            f"launching {self._name} with grid={grid}, threads={num_threads}, "
            f"shared={shared_bytes}, cluster={cluster}",
        )
