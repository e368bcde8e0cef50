"""cli/README.md and the table in README.md are what the commands say of themselves; `make
reference` writes both."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp_cli.reference import families, main, page, with_table

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "cli" / "README.md", ROOT / "README.md"
BEGIN, END = "<!-- commands, by make reference -->", "<!-- end of commands -->"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_readme_lists_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run make reference"
    assert "| `spp artifacts import` |" in text
    assert "| `spp export` |" in text


def test_a_files_table_is_renewed_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    text = README.read_text(encoding="utf-8")
    file.write_text(text.replace("| `spp export` |", "| `spp outdated` |"), encoding="utf-8")
    main(["--readme", str(file)])
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_file_without_the_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line"):
        with_table(text)


def test_the_table_of_families_is_as_it_is_now() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert families() == text, "run make reference"
