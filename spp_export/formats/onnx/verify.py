"""Checks of a published ONNX directory."""

from __future__ import annotations

from pathlib import Path

from spp_export.common.errors import ModelError
from spp_export.common.progress import progress
from spp_export.evaluation.batches import exact_dtype, oracle_logits, session_batches
from spp_export.evaluation.parity import Check
from spp_export.formats.dequantised import dequantised_logits
from spp_export.formats.format import FileChecks, Promise
from spp_export.formats.onnx.checks import (
    check_graph,
    check_logits,
    check_quantised,
    check_weights,
)
from spp_export.formats.onnx.companions import onnx_config
from spp_export.formats.onnx.files import onnx_options
from spp_export.formats.onnx.options import GRAPH_VERSION, OnnxOptions, onnx_settings
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.runtime.model import OrtModel
from spp_export.formats.onnx.runtime.module import OrtModule
from spp_export.formats.onnx.structure import difference
from spp_export.formats.onnx.write import GRAPH_NAME, genai_config_beside
from spp_export.formats.promised import compensated_projections, kept_of, promised_checkpoint
from spp_export.formats.safetensors.verify import check_tokenizer
from spp_export.models.checkpoint.checkpoint import Checkpoint, read_config
from spp_export.models.checkpoint.companions import companion_object
from spp_export.planning import Plan


def _check_version(directory: Path) -> None:
    """ModelError for a graph that another version of spp would have written otherwise."""
    recorded = read_config(directory).get("spp_onnx")
    version = recorded.get("version") if isinstance(recorded, dict) else None
    if version != GRAPH_VERSION:
        raise ModelError(
            f"{directory}: its graph is of version {version!r:.20}, this spp checks version "
            f"{GRAPH_VERSION}. Write it again, or verify it with the spp that wrote it."
        )


def check_onnx_directory(directory: Path, against: Promise) -> FileChecks:
    """Every check on a published graph, against the dense model and the plan."""
    session, compiled = against.session, against.plan
    source, options = session.source, onnx_options(directory)
    _check_version(directory)
    valid = check_graph(directory)
    if not valid.passed:
        return FileChecks((valid,))
    promised = promised_checkpoint(source, compiled)
    form = _check_form(directory, promised, options)
    if not form.passed:
        return FileChecks((valid, form))
    weights = GraphWeights(directory, source.family, promised.shape, promised.layers)
    held = _check_kept_weights(source, compiled, weights, options)
    if not held.passed:
        return FileChecks((valid, form, held))
    compensated = compensated_projections(source, compiled, weights.read)
    exact = exact_dtype(session, compensated)
    batches = session_batches(session, against.prompts, against.seed)
    with progress("checking against the masked dense model", None):
        model = OrtModel.load(directory, device=session.device)
        if options.quant is None:
            reference = oracle_logits(session, compiled, batches, compensated, exact)
            checks = check_logits(model, reference, options)
        else:
            reference = dequantised_logits(against, promised, weights.read, batches, exact)
            checks = check_quantised(model, reference, options)
    if against.prompts:
        checks = (*checks, check_tokenizer(directory, session, against.prompts))
    context = {
        "reference": str(exact).removeprefix("torch."),
        "computed_in": session.dtype,
        "layerwise": session.from_disk,
        "onnx": options.to_dict(),
    }
    module = OrtModule(model, session.device)
    return FileChecks((valid, form, held, *checks), context, module, options.quant is not None)


def _check_form(directory: Path, promised: Checkpoint, options: OnnxOptions) -> Check:
    """Configs and graph are those that spp writes for the plan."""
    name = "configs and graph as the plan makes them"
    if differs := _different_key(directory, promised, options):
        return Check(name, False, detail=f"{differs} differs from the plan")
    if differs := difference(directory, promised, options):
        return Check(name, False, detail=f"{GRAPH_NAME} differs from the plan in {differs}")
    return Check(name, True)


def _different_key(directory: Path, promised: Checkpoint, options: OnnxOptions) -> str | None:
    config = onnx_config(
        promised.config,
        promised.family,
        promised.shape,
        promised.layers,
        promised.layout,
        options,
        onnx_settings(promised).context_length,
    )
    genai = genai_config_beside(directory, config, promised, options)
    for name, expected in (("config.json", config), ("genai_config.json", genai)):
        stored = companion_object(directory, name)
        for key in sorted(stored.keys() | expected.keys()):
            if stored.get(key) != expected.get(key):
                return f"{key!r:.60} of {name}"
    return None


def _check_kept_weights(
    source: Checkpoint, compiled: Plan, weights: GraphWeights, options: OnnxOptions
) -> Check:
    """Weights are what the plan keeps of the source, but for what was compensated."""
    kept = kept_of(source, compiled)
    return check_weights("weights as the plan keeps them", weights, kept, options)
