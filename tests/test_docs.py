"""The pages in docs/ against the code: fields, columns, keys, commands, and that they build."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nanoflow_tune.autotune import cli_parser
from nanoflow_tune.autotune.document import REQUIRED_KEYS
from nanoflow_tune.profiler.store import ProfileWriter
from nanoflow_tune.runtime import plan, server
from nanoflow_tune.search_spaces.schema import HardwareSpec

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RECORDS = (
    plan.Plan,
    plan.Bucket,
    plan.GainCurve,
    plan.Candidate,
    plan.Timing,
    plan.Schedule,
    plan.NanoBatch,
    plan.NanoOp,
    plan.Verification,
    plan.BreakEven,
)


def section(page: str, heading: str) -> str:
    """Text below a heading of the page, up to the next heading of any level."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a bash block that runs one of our commands."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            lines = block.splitlines()
            found += [(page.name, line) for line in lines if line.startswith("nanoflow-")]
    return found


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_plan_page_has_every_field_of_a_record_and_no_other(record):
    assert first_cells(section("plan-format.md", record.__name__)) == [
        field.name for field in fields(record)
    ]


def test_plan_page_covers_every_record_that_a_plan_is_made_of():
    found, waiting = set(), [plan.Plan]
    while waiting:
        record = waiting.pop()
        found.add(record)
        words = re.findall(r"\w+", " ".join(str(field.type) for field in fields(record)))
        named = [getattr(plan, word, None) for word in words]
        waiting += [n for n in named if hasattr(n, "__dataclass_fields__") and n not in found]
    assert found == set(RECORDS)


def test_plan_page_names_the_schemas_that_can_be_read():
    text = (DOCS / "plan-format.md").read_text("utf-8")
    assert all(f"`{schema}`" in text for schema in plan.READABLE_SCHEMAS)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("NAME.csv", ProfileWriter.solo),
        ("NAME.pairs.csv", ProfileWriter.pairs),
        ("NAME.triples.csv", ProfileWriter.triples),
    ],
)
def test_profile_page_has_every_column_in_order(tmp_path, name, make):
    with make(tmp_path / name, {"hardware": "h200", "dtype": "bfloat16"}):
        pass
    columns = (tmp_path / name).read_text("utf-8").splitlines()[-1].split(",")
    assert first_cells(section("profile-format.md", f"Columns of {name}")) == columns


def test_numbers_page_has_every_key_of_the_json_line():
    keys = first_cells(section("numbers.md", "The line of JSON"))
    assert keys == list(REQUIRED_KEYS)


def test_extending_page_has_every_key_of_a_gpu():
    assert first_cells(section("extending.md", "A GPU")) == [f.name for f in fields(HardwareSpec)]


def test_every_file_that_the_pages_name_exists():
    folders = "autotune|profiler|runtime|search_spaces|benchmarks|results|tests"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
            is_pattern = "NAME" in name
            assert is_pattern or (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_in_the_pages_is_one_that_the_parser_takes(page, line):
    program, *arguments = shlex.split(line)
    parsers = {"nanoflow-tune": cli_parser.build_parser, "nanoflow-serve": server.build_parser}
    parsers[program]().parse_args(arguments)  # exits where it does not fit


def test_pages_name_no_place_outside_of_the_repository():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml"]:
        text = page.read_text("utf-8")
        assert text.isascii(), page.name
        assert not re.search(r"(?<![\w.])/(?:work|tmp|home|root|mnt)/", text), page.name


@pytest.mark.skipif(not importlib.util.find_spec("material"), reason="needs the extra docs")
def test_docs_build_and_load_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)", page.read_text("utf-8")
        )
        loaded += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*href=\"?([^\" >]+)",
            page.read_text("utf-8"),
        )
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], page.name
