"""Measures the runtime's own kernels: alone at every SM share, and in pairs."""

from __future__ import annotations
