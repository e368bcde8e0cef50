"""`verify` of an ONNX directory: its weights against the dense model's, its logits too.

A graph holds everything that is needed to judge it. Its weights are read back and compared with
what the plan keeps of the dense model; the projections that were re-fitted, which only the graph
knows, take their place in the masked dense model, whose logits the graph must give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.commands.onnx_files import check_version, onnx_options

from spp_export.formats.decoder import Decoder
from spp_export.formats.onnx.companions import genai_config, onnx_config
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.structure import difference
from spp_export.formats.onnx.write import GRAPH_NAME, optional_json
from spp_export.formats.promised import compensated_projections, kept_of, promised_decoder
from spp_export.models.checkpoint.source import Source
from spp_export.models.session import Session
from spp_export.planning import Plan

if TYPE_CHECKING:
    from spp_export.evaluation.parity import Check, VerifyReport


def check_onnx_directory(
    directory: Path, session: Session, compiled: Plan, prompts: Sequence[str], seed: int = 0
) -> VerifyReport:
    """Every check on a published graph, against the dense model and the plan."""
    from spp_export.commands.verify import (
        check_tokenizer,
        exact_dtype,
        oracle_logits,
        session_batches,
    )
    from spp_export.evaluation.parity import VerifyReport
    from spp_export.formats.onnx.checks import (
        check_agreement,
        check_graph,
        check_logits,
        row_logits,
    )
    from spp_export.formats.onnx.runtime.model import OrtModel

    source, options = session.source, onnx_options(directory)
    check_version(directory)
    valid = check_graph(directory)
    if not valid.passed:
        return VerifyReport((valid,))
    promised = promised_decoder(directory, source, compiled)
    form = _check_form(directory, promised, options)
    if not form.passed:
        return VerifyReport((valid, form))
    weights = GraphWeights(directory, source.family, promised.shape, promised.layers)
    held = _check_weights(source, compiled, weights, options)
    if not held.passed:
        return VerifyReport((valid, form, held))
    compensated = compensated_projections(source, compiled, weights.read)
    exact = exact_dtype(session, compensated)
    batches = session_batches(session, prompts, seed)
    with session.progress("checking against the masked dense model", None):
        reference = oracle_logits(session, compiled, batches, compensated, exact)
        model = OrtModel.load(directory, device=session.device)
        if options.quant is None:
            checks = check_logits(model, reference, options.precision)
        else:
            oracle = (
                logits.double().numpy()
                for batch, found in zip(batches, reference.exact, strict=True)
                for logits in found.split(batch.attention_mask.sum(1).tolist())
            )
            pairs = zip(oracle, row_logits(model, batches), strict=True)
            checks = (check_agreement(f"{options.quant} graph against the oracle", pairs)[0],)
    if prompts:
        checks = (*checks, check_tokenizer(directory, session, prompts))
    context = {
        "reference": str(exact).removeprefix("torch."),
        "computed_in": session.dtype,
        "layerwise": session.from_disk,
        "onnx": options.to_dict(),
    }
    return VerifyReport((valid, form, held, *checks), context)


def _check_form(directory: Path, promised: Decoder, options: OnnxOptions) -> Check:
    """Configs and graph are those that spp writes for the plan."""
    from spp_export.evaluation.parity import Check

    name = "configs and graph as the plan makes them"
    if differs := _different_key(directory, promised, options):
        return Check(name, False, detail=f"{differs} differs from the plan")
    if differs := difference(directory, promised, options):
        return Check(name, False, detail=f"{GRAPH_NAME} differs from the plan in {differs}")
    return Check(name, True)


def _different_key(directory: Path, promised: Decoder, options: OnnxOptions) -> str | None:
    config = onnx_config(
        promised.config,
        promised.family,
        promised.shape,
        promised.layers,
        promised.layout,
        options,
        promised.settings.context_length,
    )
    generation = optional_json(directory, "generation_config.json")
    head_dim = promised.shape.head_dim
    genai = genai_config(config, generation, promised.layers, head_dim, options)
    for name, wanted in (("config.json", config), ("genai_config.json", genai)):
        found = optional_json(directory, name)
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return f"{key!r:.60} of {name}"
    return None


def _check_weights(
    source: Source, compiled: Plan, weights: GraphWeights, options: OnnxOptions
) -> Check:
    """Weights are what the plan keeps of the source, but for what was compensated."""
    from spp_export.formats.onnx.checks import check_weights

    kept = kept_of(source, compiled)
    return check_weights("weights as the plan keeps them", weights, kept, options)
