from __future__ import annotations

import sys
from pathlib import Path

# Spawned ranks import the same modules by the same names.
sys.path.insert(0, str(Path(__file__).parent))
