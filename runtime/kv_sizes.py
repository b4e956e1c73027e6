"""Pages of a request: arithmetic that needs no torch."""

from __future__ import annotations

PAGE_SIZE = 16
"""Tokens of a page unless the plan says otherwise."""


def pages_for(num_tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that hold `num_tokens` tokens of one request."""
    return -(-num_tokens // page_size)
