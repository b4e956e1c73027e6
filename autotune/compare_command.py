"""`nanoflow-tune report A B`: two plans or runs, side by side on paper and on screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..search_spaces.whole_file import write_whole
from .comparison import compare, read_side
from .comparison_page import page

DEFAULT_FOLDER = Path("nanoflow-out/compare")


def compare_paths(a: Path, b: Path, folder: Path | None) -> dict[str, Any]:
    """Compare, write `compare.html` and `compare.json`, and return what the latter holds.

    Args:
        a: a plan file or the folder of a finished job.
        b: the other one.
        folder: where to write; `DEFAULT_FOLDER` when None.

    Raises:
        ValueError: a side that cannot be read.
    """
    folder = folder or DEFAULT_FOLDER
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir must be a folder, but {folder} is a file; name another")
    values = compare(read_side(a), read_side(b))
    text = json.dumps(values, indent=2, ensure_ascii=False)
    write_whole(folder / "compare.html", page(values))
    write_whole(folder / "compare.json", text + "\n")
    return {**values, "output": str(folder)}
