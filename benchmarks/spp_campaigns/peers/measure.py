"""Every plan of a model by every exporter, one step at a time."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from spp_bench.processes import run_fresh
from spp_campaigns.big_checkpoints import copy, prepare
from spp_campaigns.peers.candidates import Candidate, export
from spp_campaigns.peers.check import check, logits
from spp_campaigns.peers.plans import plans_for
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.models.families import family_of
from spp_export.models.loader import load_dense
from spp_export.planning import Plan, read_plan

# Relative to the largest logit: sums in another order differ by less, a wrong head by more.
EQUAL_WITHIN = {"float32": 1e-3, "float64": 1e-10}


@dataclass(frozen=True)
class Options:
    """Which exporters and plans take part (None: all), and how results are judged."""

    candidates: Sequence[Candidate]
    plans: Collection[str] | None = None
    precision: str = "float32"
    limit_s: float = 300


def measure(model: Path, name: str, options: Options, scratch: Path) -> dict[str, Any]:
    """Sizes of the model, the time of `cp`, and for every plan the reference and a row per
    exporter."""
    source = open_source(model, name)
    target = scratch / "copy"
    prepare(model, cold=False)
    copied, flushed = copy(model, target)
    shutil.rmtree(target)
    cases = []
    for title, plan in plans_for(source).items():
        if options.plans is None or title in options.plans:
            with tempfile.TemporaryDirectory(dir=scratch) as place:
                cases.append(_Case(source, plan, options, Path(place)).measure(title))
    return {
        "model": source.name,
        "dtype": source.dtype_name,
        "source_bytes": sum(tensor.nbytes for tensor in source.tensors.values()),
        "cp_seconds": round(copied, 3),
        "cp_and_flush_seconds": round(flushed, 3),
        "cases": cases,
    }


class _Case:
    """One plan of one model."""

    def __init__(self, source: Checkpoint, plan: Plan, options: Options, place: Path) -> None:
        self._source, self._options = source, options
        self._plan = place / "plan.json"
        self._logits = place / "logits.npy"
        self._out = place / "out"
        self._plan.write_text(plan.to_json(), encoding="utf-8")

    def measure(self, title: str) -> dict[str, Any]:
        masked = self._reference()
        rows = []
        for candidate in self._options.candidates:
            print(f"{self._source.name}, {title}: {candidate.name}", file=sys.stderr)
            rows.append({"name": candidate.name, "what": candidate.what} | self._row(candidate))
            if "run_error" in rows[-1]:
                rows[-1]["equal"] = False
            elif "difference" in rows[-1]:
                limit = EQUAL_WITHIN[self._options.precision] * masked["largest_logit"]
                rows[-1]["equal"] = rows[-1]["difference"] <= limit
            shutil.rmtree(self._out, ignore_errors=True)
        return {"plan": title, "reference": masked, "rows": rows}

    def _reference(self) -> dict[str, Any]:
        if lack := self._lack_of_memory():
            return {"skipped": lack}
        precision = self._options.precision
        return self._fresh(reference, self._source.path, self._plan, self._logits, precision)

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        """The export's measurements and what became of its result, or the error of either."""
        if candidate.package and find_spec(candidate.package.replace("-", "_")) is None:
            return {"error": f"{candidate.package} is not installed."}
        self._out.mkdir()
        prepare(self._source.path, cold=False)
        exported = self._fresh(export, candidate.name, self._source.path, self._plan, self._out)
        if "error" in exported:
            return exported
        exported["file_bytes"] = sum(path.stat().st_size for path in self._out.iterdir())
        lack = self._lack_of_memory()
        if not lack and not self._logits.exists():
            lack = "there is no reference"
        checked = self._check(None if lack else self._logits)
        if "error" in checked:
            return {**exported, "load_error": checked["error"]}
        checked["as_asked"] = checked["wrong_tensors"] == 0
        return {**exported, **checked, **({"skipped": lack} if lack else {})}

    def _check(self, expected: Path | None) -> dict[str, Any]:
        # transformers copies the code beside a checkpoint into this cache.
        cache = {"HF_MODULES_CACHE": str(self._out / "modules"), "HF_HUB_OFFLINE": "1"}
        precision = self._options.precision
        return self._fresh(
            check, self._out, self._source.path, self._plan, expected, precision, environment=cache
        )

    def _fresh(self, step: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        return run_fresh(step, *arguments, limit_s=self._options.limit_s, **options)

    def _lack_of_memory(self) -> str | None:
        """Why the model cannot run in the precision of the comparison, if it cannot."""
        precision = self._options.precision
        stored = sum(tensor.nbytes for tensor in self._source.tensors.values())
        elements = stored // self._source.shape.element_bytes
        # The weights, during loading also as stored, and room to compute.
        need = elements * int(precision.removeprefix("float")) // 8 + stored + 1_000_000_000
        free = psutil.virtual_memory().available
        if free >= need:
            return None
        return f"{precision} needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def reference(model_dir: Path, plan_file: Path, target: Path, precision: str) -> dict[str, Any]:
    """Write the logits [1,T,V] of the masked dense model; how large they are, and how far the plan
    moves them from the dense model's: if it did not, agreement would show nothing."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    family, plan = family_of(config), read_plan(plan_file)
    model = load_dense(model_dir, dtype=getattr(torch, precision))
    dense = logits(model)
    with masked_dense(model, family, family.read_shape(config, 4), plan):
        masked = logits(model)
    np.save(target, masked)
    return {
        "largest_logit": float(np.abs(masked).max()),
        "moved_by_plan": float(np.abs(masked - dense).max()),
    }
