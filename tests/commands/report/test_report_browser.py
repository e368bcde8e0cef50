"""The page in a real browser: drawn without an error in both schemes and widths, and usable.

Needs a Chromium on the path or in SPP_CHROMIUM; `make test-report` fetches one from npm.
"""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
from pages import bench, plan, write_export

import spp_export
from spp_campaigns import report_picture
from spp_campaigns.report_picture import VARIABLE, chromium, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason=f"no Chromium on the path or in {VARIABLE}"
)

TOUCH = {"device_scale_factor": 2, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, **TOUCH}
NARROWEST = {"viewport": {"width": 320, "height": 568}, **TOUCH}
SCREENS = [
    {**screen, "color_scheme": scheme}
    for screen in (DESKTOP, PHONE)
    for scheme in ("light", "dark")
]
BACKGROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 21, 27)"}
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
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


def name(screen) -> str:
    return f"{screen['viewport']['width']}-{screen.get('color_scheme', 'light')}"


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
def opened(browser, written):
    """Opens the page on a screen; `messages` collect what its console says, `requests` every
    address that it asks for."""
    contexts = []

    def on(screen, messages=None, requests=None):
        contexts.append(browser.new_context(**screen))
        page = contexts[-1].new_page()
        if messages is not None:
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
        if requests is not None:
            page.on("request", lambda request: requests.append(request.url))
        page.goto(written.as_uri())
        page.evaluate("document.fonts.ready.then(() => true)")
        return page

    yield on
    for context in contexts:
        context.close()


@pytest.mark.parametrize("screen", SCREENS, ids=name)
def test_it_is_drawn_without_an_error(opened, written, screen):
    messages, requests = [], []
    page = opened(screen, messages, requests)
    data = page.screenshot(full_page=True)
    assert messages == []
    assert requests == [written.as_uri()]
    assert page.locator("section").count() == 9
    assert page.locator("#heads [role=gridcell]").count() == 160
    width, height = struct.unpack(">II", data[16:24])
    assert width == screen["viewport"]["width"] * screen.get("device_scale_factor", 1)
    assert height > 2000
    assert page.evaluate(BACKGROUND) == BACKGROUNDS[screen["color_scheme"]]


@pytest.mark.parametrize("scheme", BACKGROUNDS)
def test_charts_have_the_colours_of_the_scheme(opened, scheme):
    page = opened({**DESKTOP, "color_scheme": scheme})
    point = page.locator("#benchmark use[role=gridcell]").last
    colour = point.evaluate("(use) => getComputedStyle(use).fill")
    assert colour == {"light": "rgb(11, 99, 181)", "dark": "rgb(90, 174, 245)"}[scheme]
    point.scroll_into_view_if_needed()
    page.evaluate(SETTLED)
    point.hover()
    assert page.evaluate(TIP).startswith("out torch\n4096 tokens: ")
    assert point.evaluate("(use) => getComputedStyle(use).strokeWidth") == "2px"


@pytest.mark.parametrize("screen", [DESKTOP, PHONE, NARROWEST], ids=name)
def test_nothing_sticks_out_of_the_window(opened, screen):
    page = opened(screen)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth") == screen["viewport"]["width"]


def test_the_keyboard_walks_the_head_map(opened):
    page = opened(DESKTOP)
    page.locator("#heads [role=gridcell]").first.focus()
    assert page.evaluate(TIP) == "Layer 0, query head 0\nKV group 0, kept"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate(TIP).startswith("Layer 2, query head 2\n")
    page.keyboard.press("End")
    assert page.evaluate(TIP).startswith("Layer 39, query head 2\n")
    # One stop of the tab key for the whole map.
    assert page.locator('#heads rect[tabindex="0"]').count() == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Layer 39")
    page.keyboard.press("Escape")
    assert page.evaluate(TIP) is None


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=name)
def test_a_pointer_and_a_finger_name_a_head(opened, screen):
    page = opened(screen)
    page.evaluate("document.getElementById('heads').scrollIntoView()")
    page.evaluate(SETTLED)
    cell = page.locator("#heads [role=gridcell]").nth(3).bounding_box()
    x, y = cell["x"] + 4, cell["y"] + 4
    if screen is PHONE:
        page.touchscreen.tap(x, y)
    else:
        page.mouse.move(x, y)
    assert page.evaluate(TIP).startswith("Layer 3, query head 0\n")
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= screen["viewport"]["width"]


def test_the_policy_stops_what_gets_into_the_page(opened):
    messages = []
    page = opened(DESKTOP, messages)
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
    assert any("Content Security Policy" in message for message in messages)


def test_paper_is_light_and_as_wide_as_it_is(opened):
    page = opened({**DESKTOP, "color_scheme": "dark"})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(BACKGROUND) == BACKGROUNDS["light"]
    assert len(page.pdf(print_background=True)) > 10_000


def test_the_picture_of_the_readme(browser, tmp_path, monkeypatch, capsys):
    # Playwright runs once per thread.
    monkeypatch.setattr(report_picture, "chromium", lambda: nullcontext(browser))
    out = write_export(tmp_path / "out")
    target = tmp_path / "pictures" / "summary.png"
    assert report_picture.main([str(out), "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    width, height = struct.unpack(">II", target.read_bytes()[16:24])
    assert width == 2 * 1088
    assert 1000 < height < 4000
    assert report_picture.main([str(tmp_path), "-o", str(target)]) == 2
