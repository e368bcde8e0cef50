"""The picture of the README: `python -m spp_campaigns.report_picture out/chemistry -o summary.png`.

It shows the top of `spp report`'s page, down to the head map, drawn by a headless Chromium in
light colours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.commands.report.report import report
from spp_export.common.errors import SppError, UsageError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VARIABLE = "SPP_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The picture has the page's own margin; text that is to be read is left out.
_WIDTH, _SCALE = 1088, 2
_LEFT_OUT = "#heads > .note, #heads > details"


def find_chromium() -> Path | None:
    """The browser that `SPP_CHROMIUM` names, or one on the path."""
    named = os.environ.get(VARIABLE)
    path = named or next(filter(None, map(shutil.which, _NAMES)), None)
    return Path(path) if path and Path(path).is_file() else None


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, driven by playwright. Raises UsageError without one."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise UsageError(f"no Chromium on the path. Install one, or name it in {VARIABLE}.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path.absolute())
        yield browser
        browser.close()


def draw(out: Path, target: Path, bench: Path | None = None) -> None:
    """Write the PNG for an export. Raises SppError where there is no browser, or no export."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        written = report(out, output=Path(folder) / "report.html", bench=bench)
        page = browser.new_page(
            viewport={"width": _WIDTH, "height": 900}, device_scale_factor=_SCALE
        )
        page.goto(written.path.as_uri())
        page.locator(_LEFT_OUT).evaluate_all("(all) => all.forEach((one) => one.remove())")
        end = page.locator("#heads").bounding_box()
        assert end is not None
        height = end["y"] + end["height"]
        page.screenshot(
            path=target, full_page=True, clip={"x": 0, "y": 0, "width": _WIDTH, "height": height}
        )


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
