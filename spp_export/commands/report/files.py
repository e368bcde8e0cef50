"""What a report reads: the files of an export's directory, or a plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.commands.report.page.figures import byte_size
from spp_export.common.errors import ModelError, SppError, UsageError
from spp_export.common.json_files import read_json
from spp_export.common.manifest import MANIFEST_NAME, hash_file
from spp_export.formats.registry import FORMATS, detect_format
from spp_export.planning import Plan, read_plan

_PLAN = "plan.json"
_MOST_FILES = 500


@dataclass(frozen=True)
class Place:
    """An export or a plan on disk.

    kind: the name of its format, or "plan". directory: of an export. page: where its report goes by
    default. plan_hash: SHA-256 of plan.json. config: its config.json, empty where it has none.
    weight_bytes: of files of weights.
    files: name, bytes and SHA-256, as the manifest lists them.
    """

    name: str
    kind: str
    plan: Plan
    plan_hash: str
    page: Path
    directory: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    files: Sequence[tuple[str, str, str]] = ()

    @property
    def quantised(self) -> str:
        """How the weights are quantised, in a word; "" where they are not."""
        quant = mapping(self.config.get(f"spp_{self.kind}")).get("quant")
        return quant if isinstance(quant, str) else ""


def open_place(path: Path) -> Place:
    """The export in a directory, or the plan in a file.

    Raises UsageError for anything else, PlanError for a plan that is malformed.
    """
    if path.is_file():
        digest = hash_file(path).sha256
        return Place(path.stem, "plan", read_plan(path), digest, path.with_suffix(".html"))
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory.")
    if not (path / _PLAN).is_file():
        raise UsageError(f"{path}: has no {_PLAN}; a report is on an export or on a plan.")
    whole = path.resolve()
    made = detect_format(path) or FORMATS["safetensors"]
    return Place(
        whole.name,
        made.name,
        read_plan(path / _PLAN),
        hash_file(path / _PLAN).sha256,
        whole.with_name(f"{whole.name}.html") if path.name in ("", "..") else _beside(path),
        path,
        _config(path),
        sum(file.stat().st_size for file in path.glob(made.weights) if file.is_file()),
        _files(path),
    )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.html")


def _config(path: Path) -> Mapping[str, Any]:
    """config.json, which a report can do without."""
    try:
        return mapping(read_json(path / "config.json", what="config", error=ModelError))
    except SppError:
        return {}


def _files(path: Path) -> Sequence[tuple[str, str, str]]:
    try:
        manifest = mapping(read_json(path / MANIFEST_NAME, what="manifest", error=ModelError))
    except SppError:
        return ()
    listed = mapping(manifest.get("files"))
    entries = [(name, mapping(entry)) for name, entry in list(listed.items())[:_MOST_FILES]]
    return [(name, _size(entry.get("bytes")), text(entry.get("sha256"))) for name, entry in entries]


def _size(value: Any) -> str:
    known = number(value)
    return "" if known is None else byte_size(known)


def number(value: Any) -> float | None:
    """A finite number, else None; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        known = float(value)
    except OverflowError:
        return None
    return known if math.isfinite(known) else None


def text(value: Any) -> str:
    """A string, or a number as one; else nothing."""
    if isinstance(value, str):
        return value
    known = number(value)
    return "" if known is None else f"{known:g}"


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[Mapping[str, Any]]:
    """The JSON objects of a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def pairs(value: Any) -> str:
    """An object's scalars in a line: keep 0.8, kind parameters."""
    scalars = ((name, text(item)) for name, item in mapping(value).items())
    return ", ".join(f"{name} {item}" for name, item in scalars if item)
