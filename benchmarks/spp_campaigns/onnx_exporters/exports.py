"""Runs an exporter in a process of its own, and looks at what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spp_campaigns.onnx_exporters.candidates import Candidate
from spp_campaigns.steps import run_step


def run_export(candidate: Candidate, slim: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """Measurements of the export and its graphs, or {"error"} in one line. `out` is created."""
    out.mkdir(parents=True)
    words = [candidate.name, str(slim), str(out)]
    measured = run_step("onnx_exporters.child", words, limit_s)
    return measured if "error" in measured else {**measured, **graph_facts(out, candidate.graphs)}


def graph_facts(directory: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Sizes of the graphs and their weights, what they are made of, and the batch they take."""
    import onnx

    facts: dict[str, Any] = {"file_mb": 0.0, "nodes": 0, "microsoft_ops": 0, "opset": 0}
    for name in names:
        model = onnx.load(directory / name, load_external_data=False)
        files = {name, *_data_files(model)}
        facts["file_mb"] += sum((directory / file).stat().st_size for file in files) / 1e6
        facts["nodes"] += len(model.graph.node)
        facts["microsoft_ops"] += sum(node.domain == "com.microsoft" for node in model.graph.node)
        facts["opset"] = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        batch = model.graph.input[0].type.tensor_type.shape.dim[0]
        facts["batch"] = batch.dim_value or "any"
    facts["file_mb"] = round(facts["file_mb"], 1)
    return facts


def _data_files(model: Any) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
