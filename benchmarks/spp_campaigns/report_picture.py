"""The picture of the README: `python -m spp_campaigns.report_picture out/chemistry -o summary.png`.

The top of `spp report`'s page, down to the head map, as a headless Chromium draws it in light
colours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spp_campaigns.chromium import Screen, chromium
from spp_export.commands.report.report import report
from spp_export.common.errors import SppError

# Two pixels of the picture for one of the page; the page's own margin is the picture's.
_SCREEN = Screen(width=1088, height=900, scale=2.0)
_TOP, _END = "main", "#heads"
# What is read rather than seen.
_LEFT_OUT = "#heads > .note, #heads > details"


def draw(out: Path, target: Path, bench: Path | None = None) -> None:
    """Write the PNG for an export. Raises SppError where there is no browser, or no export."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        written = report(out, output=Path(folder) / "report.html", bench=bench)
        page = browser.new_page()
        page.open(written.path, _SCREEN)
        target.parent.mkdir(parents=True, exist_ok=True)
        page.evaluate(f"document.querySelectorAll({_LEFT_OUT!r}).forEach((one) => one.remove())")
        page.picture(target, _TOP, _END)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 with the picture written, 2 without."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.report_picture", description=__doc__)
    parser.add_argument("out", type=Path, help="a directory written by 'spp export'")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--bench", type=Path, help="results of 'spp bench -o', for its figures")
    options = parser.parse_args(arguments)
    try:
        draw(options.out, options.output, options.bench)
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
