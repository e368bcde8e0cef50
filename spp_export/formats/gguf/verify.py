"""Checks of a published GGUF directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.common.progress import progress
from spp_export.evaluation.batches import exact_dtype, oracle_logits, session_batches
from spp_export.evaluation.parity import ReferenceLogits
from spp_export.formats.dequantised import dequantised_logits, dequantised_place
from spp_export.formats.format import FileChecks, Promise
from spp_export.formats.gguf.checks import check_engine, check_header, check_weights
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.files import gguf_context, gguf_options, shown_name
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.options import require
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.promised import compensated_projections, kept_of, promised_checkpoint
from spp_export.formats.safetensors.verify import check_tokenizer
from spp_export.planning.written import written_shape

if TYPE_CHECKING:
    from spp_export.calibration.activations import TokenBatch


def check_gguf_directory(directory: Path, against: Promise) -> FileChecks:
    """Every check on a published file, against the dense model and the plan."""
    require()
    session, compiled = against.session, against.plan
    source = session.source
    promised = promised_checkpoint(source, compiled)
    contents = gguf_contents(promised, gguf_options(directory), shown_name(compiled))
    file = read_gguf(directory)
    header = check_header(file, contents)
    if not header.passed:
        return FileChecks((header,))
    weights = GgufWeights(file, contents.tensors)
    layers, kept = compiled.written_shapes(source.shape), kept_of(source, compiled)
    specs = {s.name: s for s in source.family.tensors(written_shape(source, compiled), layers)}
    held = check_weights(
        "weights as the plan keeps them", weights, contents, lambda name: kept(specs[name])
    )
    if not held.passed:
        return FileChecks((header, held))
    compensated = compensated_projections(source, compiled, weights.read)
    exact = exact_dtype(session, compensated)

    def reference(batches: Sequence[TokenBatch]) -> ReferenceLogits:
        if contents.options.kind == "f32":
            return oracle_logits(session, compiled, batches, compensated, exact)
        return dequantised_logits(against, promised, weights.read, batches, exact)

    batches = session_batches(session, against.prompts, against.seed)
    with progress("checking against the masked dense model", None):
        engine = check_engine(directory, contents, batches, reference, session.tokenizer)
    checks = [header, held, *engine.checks]
    if against.prompts:
        checks.append(check_tokenizer(directory, session, against.prompts))
    context = {
        "reference": str(exact).removeprefix("torch."),
        "computed_in": session.dtype,
        "layerwise": session.from_disk,
        **gguf_context(contents, engine),
    }
    quantised, model = contents.options.quant is not None, None
    if quantised:
        place = dequantised_place(against, promised, weights.read)
        model = session.slim_model(place)
    return FileChecks(tuple(checks), context, model, quantised)
