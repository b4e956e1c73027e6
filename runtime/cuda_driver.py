"""The CUDA driver and NVRTC through `cuda.bindings`, and one way to check what they return.

Both are loaded when first asked for: a machine without a GPU needs neither. They have no types, so
that callers see `Any`.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {"driver": "cuda.bindings.driver", "nvrtc": "cuda.bindings.nvrtc"}


class CudaDriverError(RuntimeError):
    """A call of the driver or of NVRTC failed; says which, and with what error."""


def driver() -> Any:  # noqa: ANN401 - untyped module
    """The driver API."""
    return importlib.import_module(_MODULES["driver"])


def nvrtc() -> Any:  # noqa: ANN401 - untyped module
    """The runtime compiler; works without a GPU and without a driver."""
    return importlib.import_module(_MODULES["nvrtc"])


def checked(result: tuple[Any, ...], what: str) -> Any:  # noqa: ANN401 - driver handles
    """The values of a call `(error, value, ...)`: one alone, several as a tuple, none as ().

    Raises:
        CudaDriverError: the error is not success; `what` names the call.
    """
    error, *values = result
    if int(error) != 0:
        raise CudaDriverError(f"{what} failed: {error}")
    return values[0] if len(values) == 1 else tuple(values)
