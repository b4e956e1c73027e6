"""mkdocs hooks: what the pages take from the repository instead of repeating it.

`<!-- README: NAME -->` in a page becomes the section `## NAME` of README.md, without its heading;
`figures/timeline.png` is the shipped report's picture.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"figures/timeline.png": "results/reports/llama3-8b-h200-tp1/timeline.png"}
_SECTION = re.compile(r"<!-- README: (.+?) -->")


def readme_section(name: str) -> str:
    """Text below `## NAME` of README.md, up to the next heading of that level.

    Raises:
        ValueError: README.md has no such section.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {name!r}; change the page that asks for it")
    return found[1].strip()


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401
    """Add the pictures that lie outside of docs/."""
    for place, source in FIGURES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401
    """Put sections of README.md where a page asks for them."""
    return _SECTION.sub(lambda found: readme_section(found[1]), markdown)
