"""Which NVML handles stand for CUDA's GPUs."""

from __future__ import annotations

import pytest

from nanoflow_tune.profiler.visible_gpus import VARIABLE, visible_gpus


class FourGpus:
    """NVML of a machine with four cards; a handle is its index."""

    uuids = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return self.uuids[handle]


@pytest.mark.parametrize(
    ("wanted", "handles"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        ("3,0", [3, 0]),
        (" 1 , 2", [1, 2]),
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-c", [3]),
        ("GPU-aa", []),  # two cards begin so
        ("1,9,2", [1]),
        ("-1", []),
        ("0,-1,1", [0]),
    ],
)
def test_handles_follow_cudas_numbering(monkeypatch, wanted, handles):
    if wanted is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, wanted)
    assert visible_gpus(FourGpus()) == handles
