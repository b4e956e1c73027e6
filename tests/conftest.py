"""Shared fixtures; `gpu` tests are skipped where there is no CUDA device."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # here, so that runs without gpu tests do not pay for it

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def ranks_that():
    """Makes a stand-in for `RankGroup`: a class whose `call` is some function."""

    def make(call):
        class Ranks:
            def __init__(self, *_, **__):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        Ranks.call = staticmethod(call)
        return Ranks

    return make
