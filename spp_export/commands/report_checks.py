"""verify.json as parts of a report: checks with their limits, and quality on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spp_export.commands.report_values import mapping, number, objects, text

from spp_export.commands.report.page import Check, Checks, Fact, Hint
from spp_export.commands.report.page.figures import count, figure, percent, times
from spp_export.common.errors import ModelError, SppError
from spp_export.common.json_files import read_json

NAME = "verify.json"


def read_verdict(directory: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The report in a directory, or None and why there is none to show."""
    if not (directory / NAME).is_file():
        return None, "This export was not verified when it was written."
    try:
        found = read_json(directory / NAME, what="report", error=ModelError)
    except SppError as error:
        return None, str(error)
    if not isinstance(found, dict) or not isinstance(found.get("passed"), bool):
        return None, f"{NAME} is no report of checks."
    return found, ""


def checks_part(verdict: Mapping[str, Any], reference: str) -> Checks:
    """Every check that the report holds. It has passed where all of them have.

    reference: what the export was compared with.
    """
    found = tuple(
        Check(
            text(check.get("name")),
            check.get("passed") is True,
            number(check.get("found")),
            number(check.get("limit")),
            text(check.get("detail")),
        )
        for check in objects(verdict.get("checks"))
    )
    precise, dtype = text(verdict.get("reference")), text(verdict.get("computed_in"))
    notes = [f"The reference is {reference}."]
    if precise and dtype:
        notes = [
            f"The reference is {reference}, in {precise}; the export computed in {dtype}. A limit "
            "is what the masked model itself loses to rounding, and a little more."
        ]
    passed = verdict["passed"] and all(check.passed for check in found)
    return Checks(passed, found, tuple(notes))


def unverified(why: str, command: str) -> Hint:
    """A section without checks, and what makes them."""
    return Hint(f"{why} Check it against its dense model:", command)


def quality_facts(verdict: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Figures on text that the plan has not seen, and what quantising cost."""
    found = mapping(verdict.get("quality"))
    ratio, dense, slim = (
        number(found.get(name)) for name in ("ratio", "dense_perplexity", "slim_perplexity")
    )
    facts = []
    if ratio is not None:
        beside = (
            "" if dense is None or slim is None else f" ({figure(slim, 4)} / {figure(dense, 4)})"
        )
        facts.append(Fact("Perplexity over dense", f"{times(ratio, 4)}{beside}"))
    facts += _distances(found, "dense")
    if sizes := [number(found.get(name)) for name in ("texts", "tokens")]:
        texts, tokens = sizes
        if texts is not None and tokens is not None:
            held_out = f"{count(texts)} held-out texts of the scenario, {count(tokens)} tokens"
            facts.append(Fact("Measured on", held_out))
    facts += _distances(mapping(verdict.get("quantisation")), "unquantised")
    return tuple(facts)


def _distances(found: Mapping[str, Any], other: str) -> list[Fact]:
    kl, top1 = number(found.get("mean_kl")), number(found.get("top1"))
    facts = []
    if kl is not None:
        facts.append(Fact(f"Mean KL to {other}", f"{figure(kl)} nats per token"))
    if top1 is not None:
        facts.append(Fact(f"Same first token as {other}", percent(top1)))
    return facts
