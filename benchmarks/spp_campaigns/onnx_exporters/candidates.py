"""Who exports, and what became of it. Imports an exporter only to run it."""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from spp_bench.processes import held, peak, run_fresh

if TYPE_CHECKING:
    from spp_export.formats.onnx.options import Attention

# (slim checkpoint, empty directory)
Export = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Candidate:
    """An exporter: `prepare` imports what it needs and returns what is measured."""

    name: str
    what: str
    prepare: Callable[[], Export]
    graphs: tuple[str, ...] = ("model.onnx",)  # two: the prompt's, then the next token's


def _ours(attention: Attention) -> Callable[[], Export]:
    def prepare() -> Export:
        import onnx_ir  # noqa: F401

        import spp_export.models.loader  # noqa: F401  the rotary tables are transformers' own
        from spp_export.formats.onnx.options import OnnxOptions
        from spp_export.formats.onnx.write import write_onnx

        return lambda slim, out: write_onnx(slim, out, OnnxOptions(attention=attention))

    return prepare


def _torch(opset: int) -> Callable[[], Export]:
    def prepare() -> Export:
        from spp_campaigns.onnx_exporters.by_torch import export

        return lambda slim, out: export(slim, out / "model.onnx", opset)

    return prepare


def _transformers(*, fused: bool, batch: int | None) -> Callable[[], Export]:
    def prepare() -> Export:
        from spp_campaigns.onnx_exporters.by_transformers import export_single_graph

        return lambda slim, out: export_single_graph(slim, out, fused=fused, batch=batch)

    return prepare


def _transformers_stages() -> Export:
    from spp_campaigns.onnx_exporters.by_transformers import export_stages

    return export_stages


def _genai() -> Export:
    """The model builder of onnxruntime-genai, as its command line: fp32 for the CPU, with the
    checkpoint's own code allowed."""
    import onnxruntime_genai  # noqa: F401

    builder = "onnxruntime_genai.models.builder"

    def export(slim: Path, out: Path) -> None:
        settings = {"-m": slim, "-o": out, "-p": "fp32", "-e": "cpu", "-c": out / "cache"}
        words = [word for pair in settings.items() for word in map(str, pair)]
        with patch.object(sys, "argv", [builder, *words, "--extra_options", "hf_remote=true"]):
            runpy.run_module(builder, run_name="__main__")

    return export


STAGES = ("prefill.onnx", "decode.onnx")
_CANDIDATES = (
    Candidate("spp gqa", "our builder, GroupQueryAttention", _ours("gqa")),
    Candidate("spp gqa-bias", "the same, positions and mask outside", _ours("gqa-bias")),
    Candidate("spp standard", "our builder, opset 24 alone", _ours("standard")),
    Candidate("torch 18", "torch.onnx.export(dynamo=True), opset 18", _torch(18)),
    Candidate("torch 23", "torch.onnx.export(dynamo=True), opset 23", _torch(23)),
    Candidate(
        "transformers",
        "OnnxExporter.export, any batch",
        _transformers(fused=False, batch=None),
    ),
    Candidate(
        "transformers fused",
        "the same, ort_fusions='cpu'",
        _transformers(fused=True, batch=None),
    ),
    Candidate(
        "transformers fused 1",
        "the same, batch fixed at 1, which lets it fuse GroupQueryAttention",
        _transformers(fused=True, batch=1),
    ),
    Candidate(
        "transformers stages",
        "OnnxExporter.export_for_generation, ort_fusions='cpu': a graph for the prompt, one for "
        "the next token, each with all weights",
        _transformers_stages,
        STAGES,
    ),
    Candidate("genai builder", "onnxruntime_genai.models.builder, as it is", _genai),
)
CANDIDATES = {candidate.name: candidate for candidate in _CANDIDATES}


def export(name: str, slim: Path, out: Path) -> dict[str, float]:
    """One export in this process: its time after imports, and its peak resident memory above what
    the imports take."""
    step = CANDIDATES[name].prepare()
    before = held()
    start = time.perf_counter()
    step(slim, out)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3),
        "peak_mb": round(max(0, peak() - before) / 1e6, 1),
    }


def run_export(candidate: Candidate, slim: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """Measurements of the export and its graphs, or {"error"} in one line. `out` is created."""
    out.mkdir(parents=True)
    measured = run_fresh(export, candidate.name, slim, out, limit_s=limit_s)
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
