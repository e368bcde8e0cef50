"""Links between the repository's documents lead to files and headings that are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def documents() -> list[str]:
    """Every Markdown file that git has or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    run = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.splitlines() if (ROOT / name).is_file()]


def prose(path: Path) -> str:
    """A document without its code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link: lower case, hyphens for spaces, no punctuation."""
    titles = HEADING.findall(prose(path))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", documents())
def test_links(name: str) -> None:
    document = ROOT / name
    for target, anchor in LINK.findall(prose(document)):
        file = document.parent / target if target else document
        assert file.is_file(), f"{target}: no such file; a folder is linked by its README.md"
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}: no such heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == pages


def test_results_that_the_benchmarks_name_are_there_or_are_said_not_to_be() -> None:
    folder = ROOT / "benchmarks"
    rows = [line for line in prose(folder / "README.md").splitlines() if line.startswith("| `")]
    named = 0
    for row in rows:
        for name in re.findall(r"`(results/[\w./-]+)`", row):
            assert (folder / name).exists() != (f"`{name}`; none yet" in row), row
            named += 1
    assert named > 20
