"""`python -m nanoflow_tune.autotune` is `nanoflow-tune`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
