"""`nanoflow-serve`: says what to use until the bundled server is there."""

from __future__ import annotations

import sys


def main() -> int:
    """Print what works today; the exit code says that nothing was served."""
    print(
        "nanoflow-serve: serving arrives in a later release. Today `nanoflow-tune --model NAME` "
        "makes a plan, runs and verifies it, and reports what it gains.",
        file=sys.stderr,
    )
    return 2
