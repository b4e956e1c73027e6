"""NVML's handles of the GPUs that CUDA shows this process, in CUDA's order. No torch.

NVML knows nothing of `CUDA_VISIBLE_DEVICES`: its GPU 0 may be another card than `cuda:0`, and the
watts of a neighbour look like one's own.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(nvml: Any) -> list[Any]:  # noqa: ANN401 - untyped module
    """Handles by CUDA index; as CUDA does, the list ends before the first unknown entry.

    Args:
        nvml: the module `pynvml`, initialised, or a stand-in.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return handles
    names = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    visible: list[Any] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(handles) else []
        else:
            matches = [i for i, name in enumerate(names) if entry and name.startswith(entry)]
        if len(matches) != 1:
            break
        visible.append(handles[matches[0]])
    return visible
