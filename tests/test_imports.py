"""Imports go one way: a module may import those before it in ORDER, or beside it, never after."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "spp_export": ROOT / "spp_export",
    "spp_cli": ROOT / "cli" / "spp_cli",
    "spp_kernels": ROOT / "kernels" / "spp_kernels",
    "spp_bench": ROOT / "benchmarks" / "spp_bench",
}
# One line is one step of the flow. A name stands for a module or a whole package.
ORDER = [
    ["errors", "shape", "progress", "versions", "quiet", "memory"],
    ["jsonio", "working_place"],
    ["scenario", "pools", "artifacts", "artifacts_checks", "artifacts_import"],
    ["diagnosis"],
    ["importance"],
    ["latency", "latency_file"],
    ["knapsack", "allocate", "budget", "bound", "published"],
    ["plans"],
    ["families"],
    ["slicing", "compensate", "slim_config", "engines", "report_page"],
    ["checkpoint", "card"],
    ["modeling", "loader_registration", "vllm_plugin", "models", "tokenization", "preflight"],
    ["onnx_graph", "gguf_file"],
    ["loader", "transformers_cli", "weights_on_disk", "layerwise", "activations"],
    ["gradients", "statistics_pass", "statistics_cache"],
    ["moments", "probing", "reference", "probe_pruning"],
    ["ort"],
    ["quality", "verification", "onnx_checks", "gguf_checks"],
    ["recovery"],
    ["session"],
    ["evaluation"],
    ["pipeline"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Everything up to here plans, slices and writes with numpy alone.
TORCH_FREE = {name for names in ORDER[: ORDER.index(["checkpoint", "card"]) + 1] for name in names}


def modules(package: str) -> list[Path]:
    return sorted(SOURCES[package].rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names a file imports anywhere in it, also lazily and for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def place(path: Path) -> str:
    relative = path.relative_to(SOURCES["spp_export"])
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", modules("spp_export"), ids=lambda p: str(p.relative_to(SOURCES["spp_export"]))
)
def test_library_imports_one_way(path: Path) -> None:
    own = place(path)
    if own == "__init__":  # the table of contents names everything
        return
    assert own in RANK, f"{own} has no place in ORDER"
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == "spp_export" and rest:
            other = rest.partition(".")[0]
            assert RANK[other] <= RANK[own], f"{own} imports {other}, which comes later"
        assert root not in {"spp_cli", "spp_bench"}, f"the library imports {name}"


@pytest.mark.parametrize("package", ["spp_kernels", "spp_bench", "spp_cli"])
def test_packages_import_one_way(package: str) -> None:
    forbidden = {
        "spp_kernels": {"spp_export", "spp_bench", "spp_cli", "transformers"},
        "spp_bench": {"spp_cli"},
        "spp_cli": set[str](),
    }[package]
    for path in modules(package):
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & forbidden, f"{path.name} imports {roots & forbidden}"


def test_planning_and_slicing_import_no_torch() -> None:
    names = []
    for path in modules("spp_export"):
        if place(path) in TORCH_FREE and path.name != "__init__.py":
            dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            names.append(dotted)
    code = f"import sys\nfor n in {names!r}: __import__(n)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_package_takes_a_generic_name() -> None:
    """`kernels` at the top level would shadow the package that transformers looks for."""
    for folder in ("cli", "kernels", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
