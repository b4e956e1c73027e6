"""What is tuned, on what, for whom: model, hardware, workload and search-space specs as YAML."""

from __future__ import annotations
