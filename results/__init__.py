"""Shipped profiles, plans and reports: data only."""

from __future__ import annotations
