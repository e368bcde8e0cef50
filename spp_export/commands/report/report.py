"""`report`: one page on an export or a plan, from the files that are there and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.commands.report.facts import report_parts
from spp_export.commands.report.files import Place, open_place
from spp_export.commands.report.page import GENERATOR, render
from spp_export.commands.requests import ReportRequest
from spp_export.common.errors import OutputError, UsageError
from spp_export.common.options import command

_MARK = f'<meta name="generator" content="{GENERATOR} '.encode()
_MARK_WITHIN = 4096


@dataclass(frozen=True)
class ReportResult:
    """The page that was written.

    sections: ids in the page's order. missing: sections that could say more, with the command.
    """

    path: Path
    bytes: int
    sha256: str
    sections: tuple[str, ...]
    missing: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "sections": list(self.sections),
            "missing": dict(self.missing),
        }


@command(ReportRequest)
def report(request: ReportRequest) -> ReportResult:
    """Write a page on an export's directory or on a plan; no weights are read.

    Equal inputs give equal bytes. Raises UsageError for what is neither, or measures something
    else, and OutputError where the page cannot be written or, without `force`, exists.

        spp_export.report("out/chemistry", "chemistry.html", bench="bench.json", eval="results")
    """
    place = open_place(Path(request.out))
    target = Path(request.output) if request.output is not None else place.page
    _check_target(target, place, request.force)
    parts = report_parts(
        place,
        bench=None if request.bench is None else Path(request.bench),
        evaluation=None if request.eval is None else Path(request.eval),
        artifacts=None if request.artifacts is None else os.fspath(request.artifacts),
    )
    data = render(parts).encode()
    _write(target, data)
    digest = hashlib.sha256(data).hexdigest()
    return ReportResult(target, len(data), digest, _sections(parts), _missing(parts))


def _sections(parts: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("mixture", "savings", "heads", "channels", "checks", "quality", "benchmark", "engines")
    return (*(name for name in names if name == "savings" or parts[name]), "provenance")


def _missing(parts: Mapping[str, Any]) -> dict[str, str]:
    sections = {name: parts[name] for name in ("checks", "benchmark", "quality")}
    hints = {name: part for name, part in sections.items() if isinstance(part, Mapping)}
    return {name: part["command"] for name, part in hints.items() if part.get("command")}


def _check_target(target: Path, place: Place, force: bool) -> None:
    inside = Path(os.path.realpath(target.parent))
    own = Path(os.path.realpath(place.directory)) if place.directory else None
    if own and (inside == own or own in inside.parents):
        raise UsageError(
            f"{target}: lies in the export, whose manifest lists every file. Write the page "
            "elsewhere with -o."
        )
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, expected the name of a file.")
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target}: already exists. Choose another name or use --force.")
    if not _ours(target):
        raise OutputError(
            f"{target}: is no page of 'spp report', and --force replaces only those. "
            "Choose another name."
        )


def _ours(target: Path) -> bool:
    try:
        with target.open("rb") as file:
            return _MARK in file.read(_MARK_WITHIN)
    except OSError:
        return False


def _write(target: Path, data: bytes) -> None:
    """Write the file in one step, so that there is never half a page."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
