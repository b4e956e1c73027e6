"""Loads and launches the CUDA C++ kernels of `cuda/`, and makes tensor maps for TMA.

`CudaKernel` compiles a kernel (`cubin.py`) and loads it into the current context on first use; it
launches on torch's current stream. Arguments are ctypes scalars, tensors (their address) and
`TensorMap`s (by value).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuda_driver import checked, driver
from .cubin import Cubin, compile_cubin

_MAX_STATIC_SHARED_BYTES = 48 << 10


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
    api = driver()
    data_types = {
        2: api.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4: api.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    swizzles = {
        0: api.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        64: api.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        128: api.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
    }
    promotions = {
        0: api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        64: api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        128: api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        256: api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }
    encoded = checked(
        api.cuTensorMapEncodeTiled(
            data_types[itemsize],
            len(sizes),
            address,
            [api.cuuint64_t(size) for size in sizes],
            [api.cuuint64_t(stride) for stride in strides_bytes],
            [api.cuuint32_t(size) for size in box],
            [api.cuuint32_t(1) for _ in sizes],
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles[swizzle_bytes],
            promotions[l2_promotion_bytes],
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
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
        api = driver()
        device = torch.cuda.current_device()
        if device not in self._functions:
            library = checked(
                api.cuLibraryLoadData(self.compile().code, [], [], 0, [], [], 0),
                f"loading {self._file}",
            )
            kernel = checked(
                api.cuLibraryGetKernel(library, self._name.encode()), f"finding {self._name}"
            )
            # The function of the primary context also runs in green contexts' streams.
            function = checked(api.cuKernelGetFunction(kernel), f"finding {self._name}")
            limit = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if shared_bytes > _MAX_STATIC_SHARED_BYTES:
                checked(
                    api.cuFuncSetAttribute(function, limit, shared_bytes),
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
            CudaDriverError: the driver refuses.
        """
        api = driver()
        torch.cuda.current_stream()  # makes the primary context current on this thread
        function = self._function(shared_bytes)
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes: list[Any] = []
        if cluster > 1:
            attribute = api.CUlaunchAttribute()
            attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = 1
            attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        if overlaps_previous:
            attribute = api.CUlaunchAttribute()
            ids = api.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        checked(
            api.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0),
            f"launching {self._name} with grid={grid}, threads={num_threads}, "
            f"shared={shared_bytes}, cluster={cluster}",
        )
