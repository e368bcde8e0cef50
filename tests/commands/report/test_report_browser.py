"""The page in a real browser: drawn without an error in both schemes and widths, and usable.

Wants a Chromium on the path or in SPP_CHROMIUM; `make test-report` fetches one from npm.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from pages import bench, plan, write_export

import spp_export
from spp_campaigns import report_picture
from spp_campaigns.chromium import VARIABLE, Page, Screen, chromium, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason=f"no Chromium on the path or in {VARIABLE}"
)

DESKTOP, PHONE = Screen(), Screen(390, 844, 2.0, phone=True)
NARROWEST = Screen(320, 568, 2.0, phone=True)
SCREENS = [
    Screen(one.width, one.height, one.scale, scheme, one.phone)
    for one in (DESKTOP, PHONE)
    for scheme in ("light", "dark")
]
# Elements that stick out of the window, but for what scrolls in a box of its own.
OVERFLOWING = """[...document.querySelectorAll("body *")].filter((one) =>
  !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 0.5
).map((one) => one.outerHTML.slice(0, 80))"""
# Events of scrolling come with the next frame.
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
TIP = """(() => {
  const tip = document.getElementById("tip");
  return tip.hidden ? null : tip.textContent;
})()"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A page with every kind of section: wide maps, long names, curves."""
    root = tmp_path_factory.mktemp("report")
    layers = plan()["layers"] * 10
    names = {"name": "a-scenario-with-a-name-that-nothing-can-break-" * 3, "sha256": "a" * 64}
    out = write_export(root / "out", plan=plan(layers=layers, scenario=names))
    digest = hashlib.sha256((out / "plan.json").read_bytes()).hexdigest()
    results = root / "bench.json"
    results.write_text(json.dumps(bench(digest, (64, 512, 4096))))
    return spp_export.report(out, bench=results).path


@pytest.fixture
def page(browser) -> Page:
    return browser.new_page()


@pytest.mark.parametrize("screen", SCREENS, ids=lambda s: f"{s.width}-{s.scheme}")
def test_it_is_drawn_without_an_error(page, written, screen, tmp_path):
    page.open(written, screen)
    assert page.messages == []
    assert page.requests == [written.resolve().as_uri()]
    assert page.evaluate("document.querySelectorAll('section').length") == 9
    assert page.evaluate("document.querySelectorAll('#heads [role=gridcell]').length") == 160
    page.picture(tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert width == screen.width * screen.scale
    assert height > 2000
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 21, 27)"}[screen.scheme]


@pytest.mark.parametrize("screen", [DESKTOP, PHONE, NARROWEST], ids=lambda s: str(s.width))
def test_nothing_sticks_out_of_the_window(page, written, screen):
    page.open(written, screen)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth") == screen.width


def test_the_keyboard_walks_the_head_map(page, written):
    page.open(written, DESKTOP)
    page.evaluate("document.querySelector('#heads [role=gridcell]').focus()")
    assert page.evaluate(TIP) == "Layer 0, query head 0\nKV group 0, kept"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.press(key)
    assert page.evaluate(TIP).startswith("Layer 2, query head 2\n")
    page.press("End")
    assert page.evaluate(TIP).startswith("Layer 39, query head 2\n")
    # One stop of the tab key for the whole map.
    assert page.evaluate("document.querySelectorAll('#heads rect[tabindex=\"0\"]').length") == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Layer 39")
    page.press("Escape")
    assert page.evaluate(TIP) is None


def test_a_pointer_and_a_finger_name_a_head(page, written):
    cell = "document.querySelectorAll('#heads [role=gridcell]')[3].getBoundingClientRect()"
    for screen in (DESKTOP, PHONE):
        page.open(written, screen)
        page.evaluate("document.getElementById('heads').scrollIntoView()")
        page.evaluate(SETTLED)
        x, y = (page.evaluate(f"{cell}.{side} + 4") for side in ("x", "y"))
        if screen.phone:
            page.call("Emulation.setTouchEmulationEnabled", enabled=True)
            points = [{"x": x, "y": y}]
            page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
            page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert page.evaluate(TIP).startswith("Layer 3, query head 0\n")
        box = "document.getElementById('tip').getBoundingClientRect()"
        assert page.evaluate(f"{box}.left") >= 0
        assert page.evaluate(f"{box}.right") <= screen.width


def test_the_policy_stops_what_gets_into_the_page(page, written):
    page.open(written, DESKTOP)
    page.evaluate(
        """(() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          const image = document.createElement("img");
          image.src = "https://example.com/x.png";
          document.body.append(image);
        })()"""
    )
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in message for message in page.messages)


def test_paper_is_light_and_as_wide_as_it_is(page, written):
    page.open(written, Screen(scheme="dark"))
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    found = page.call("Page.printToPDF", printBackground=True)
    assert len(found["data"]) > 10_000


def test_the_picture_of_the_readme(tmp_path, capsys):
    out = write_export(tmp_path / "out")
    target = tmp_path / "pictures" / "summary.png"
    assert report_picture.main([str(out), "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    width, height = struct.unpack(">II", target.read_bytes()[16:24])
    assert width == 2 * 1088
    assert 1000 < height < 4000
    assert report_picture.main([str(tmp_path), "-o", str(target)]) == 2
