"""Who exports, and what each of them is asked for. Imports nothing that exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
        from spp_campaigns.onnx_exporters.by_transformers import export_one_graph

        return lambda slim, out: export_one_graph(slim, out, fused=fused, batch=batch)

    return prepare


def _transformers_stages() -> Export:
    from spp_campaigns.onnx_exporters.by_transformers import export_stages

    return export_stages


def _genai() -> Export:
    from spp_campaigns.onnx_exporters.by_genai import export

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
