"""cli/README.md is what the commands say of themselves; `make reference` writes it."""

from __future__ import annotations

from pathlib import Path

from spp_cli.reference import page

PAGE = Path(__file__).resolve().parents[2] / "cli" / "README.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
