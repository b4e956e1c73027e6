"""Cost model, bounds, simulator, structure and share search, refinement, report, command line."""

from __future__ import annotations
