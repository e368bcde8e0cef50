"""The page as a whole. It asks the network for nothing, and its policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from spp_export.commands.report.page import sections
from spp_export.commands.report.page.heads import LayerAxis
from spp_export.commands.report.page.markup import Html, joined, tag, void
from spp_export.commands.report.page.record import Report

# Tells a page of ours from other files.
GENERATOR = "spp report"
# A layer's column on the narrowest screen, in pixels; the picture scrolls in its box below that.
_LEAST_COLUMN = 13


def render(report: Report) -> str:
    """The HTML text; equal records give equal text."""
    style, script = _style(report), _resource("script.js")
    head = [
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("meta", name="referrer", content="no-referrer"),
        void("meta", name="generator", content=f"{GENERATOR} {report.generator}"),
        # Without it a browser asks the server for one.
        void("link", rel="icon", href="data:,"),
        tag("title", report.title),
        tag("style", Html(style)),
    ]
    body = [_main(report), _footer(report), _tip(), tag("script", Html(script))]
    page = tag("html", tag("head", joined(head, "\n")), tag("body", joined(body, "\n")), lang="en")
    return f"<!doctype html>\n{page}\n"


def _main(report: Report) -> Html:
    """The overview, which makes a picture by itself, and the rest."""
    domains = [sections.mixture(report.mixture)] if report.mixture else []
    pair = tag("div", *domains, sections.savings(report.savings), class_="pair")
    overview = [sections.header(report), pair, sections.heads(report.heads)]
    parts = [
        report.channels and sections.channels(report.channels),
        report.checks and sections.checks(report.checks),
        report.quality and sections.quality(report.quality),
        report.benchmark and sections.benchmark(report.benchmark),
        sections.engines(report) if report.engines else None,
        sections.provenance(report),
    ]
    rest = joined([part for part in parts if part], "\n")
    return tag("main", tag("div", joined(overview, "\n"), id="overview"), rest)


def _footer(report: Report) -> Html:
    return tag("footer", tag("p", f"Made by {GENERATOR}, spp {report.generator}."))


def _tip() -> Html:
    return tag("div", id="tip", role="tooltip", hidden=True)


def _style(report: Report) -> str:
    axis = LayerAxis(len(report.heads.layers))
    narrow = min(axis.width, axis.x(0) + _LEAST_COLUMN * axis.layers)
    return f"{_resource('style.css')}svg.map{{min-width:{narrow}px;max-width:{axis.width}px}}\n"


def _policy(style: str, script: str) -> str:
    """Nothing but this very style and this very script."""
    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}"
    )


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _resource(name: str) -> str:
    return files("spp_export.commands.report.page").joinpath(name).read_text(encoding="utf-8")
