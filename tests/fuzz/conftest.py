"""Fuzzing: every test here is marked `fuzz`; `--hypothesis-profile=long` tries 40 times as much."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # its modules are imported by bare name, as in the other folders
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile("long", max_examples=4000, deadline=None, suppress_health_check=QUIET)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("fuzz")
