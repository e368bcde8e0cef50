"""What is said of an export in another format: sizes, engines and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spp_export.commands.export_request import ExportResult
from spp_export.formats.card import gguf_card, model_card, onnx_card
from spp_export.formats.gguf.format import (
    promised_contents,
)
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.gguf.write import stored_bytes
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.models.engines import gguf_engines, onnx_engines
from spp_export.models.hub import model_license
from spp_export.models.session import Session
from spp_export.planning.bound import predicted
from spp_export.slicing.compensation import (
    written_shape,
)


def as_onnx(result: ExportResult, session: Session, options: OnnxOptions) -> ExportResult:
    """Engines of a graph, and sizes in its precision."""
    source, compiled = session.source, result.plan
    size = options.element_bytes
    dense = replace(source.shape, element_bytes=size)
    written = replace(written_shape(source, compiled), element_bytes=size)
    return replace(
        result,
        onnx=options,
        predicted=predicted(dense, compiled.written_shapes(source.shape), written),
        engines=onnx_engines(compiled.written_layout, **options.to_dict()),
    )


def as_gguf(result: ExportResult, session: Session, options: GgufOptions) -> ExportResult:
    """What the file is to hold, which engines take it, and sizes in its precision."""
    source, compiled = session.source, result.plan
    contents = promised_contents(source, compiled, options)
    assert result.needs
    file = sum(stored_bytes(tensor) for tensor in contents.tensors)
    needs = replace(result.needs, disk={**result.needs.disk, "GGUF file": file})
    size = contents.options.element_bytes
    dense = replace(source.shape, element_bytes=size)
    written = replace(written_shape(source, compiled), element_bytes=size)
    return replace(
        result,
        gguf=contents,
        needs=needs,
        predicted=predicted(dense, compiled.written_shapes(source.shape), written),
        engines=gguf_engines(contents.architecture.name),
    )


def export_card(
    name: str, session: Session, result: ExportResult, report: Mapping[str, Any] | None
) -> str:
    license_name = model_license(session.source.path)
    sizes = result.plan, result.shape, result.predicted
    base = result.plan.model_source
    if result.gguf:
        said = result.gguf.summary()
        return gguf_card(name, base, said, report, result.engines, license_name, sizes)
    if result.onnx is None:
        return model_card(name, *sizes, report, result.engines, license_name)
    form = result.onnx.attention
    return onnx_card(name, base, form, report, result.engines, license_name, sizes)
