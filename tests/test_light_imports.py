"""What plans, slices and writes does so with numpy alone."""

from __future__ import annotations

import subprocess
import sys

from test_imports import ROOT, SOURCES

# Whole rooms and folders, and single files, that import no torch.
TORCH_FREE = [
    "common",
    "data",
    "models.shape",
    "models.families",
    "models.checkpoint",
    "models.engines",
    "importance.axis",
    "importance.base",
    "importance.comparable",
    "importance.dass",
    "importance.energy",
    "importance.flap",
    "importance.llm_pruner",
    "importance.loraprune",
    "importance.magnitude",
    "importance.obs",
    "importance.ppsp",
    "importance.probe_counts",
    "importance.random",
    "importance.ria",
    "importance.taylor",
    "importance.units",
    "importance.wanda",
    "importance.wanda_sp",
    "calibration.statistics",
    "calibration.refit",
    "domains.diagnosis",
    "planning.allocate",
    "planning.bound",
    "planning.budget",
    "planning.compile",
    "planning.infeasible",
    "planning.knapsack",
    "planning.latency",
    "planning.plan",
    "planning.plan_file",
    "planning.published",
    "planning.written",
    "slicing.config",
    "slicing.cut",
    "slicing.weights",
    "formats.card",
    "commands.chat",
    "commands.report.page",
]


def test_planning_and_slicing_import_no_torch() -> None:
    names = [
        name
        for name in SOURCES
        if any(
            name == f"spp_export.{at}" or name.startswith(f"spp_export.{at}.") for at in TORCH_FREE
        )
    ]
    assert len(names) > len(TORCH_FREE)
    code = f"import sys\nfor n in {names!r}: __import__(n); assert 'torch' not in sys.modules, n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_package_takes_a_generic_name() -> None:
    """`kernels` at the top level would shadow the package that transformers looks for."""
    for folder in ("cli", "kernels", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
