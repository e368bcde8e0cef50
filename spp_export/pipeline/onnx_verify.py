"""`verify` of an ONNX directory: its weights against the dense model's, its logits too.

A graph holds everything that is needed to judge it. Its weights are read back and compared with
what the plan keeps of the dense model; the projections that were re-fitted, which only the graph
knows, take their place in the masked dense model, whose logits the graph must give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_export.checkpoint.header import StoredTensor
from spp_export.checkpoint.reader import read_float
from spp_export.checkpoint.source import Source
from spp_export.families import TensorSpec
from spp_export.onnx_graph.companions import genai_config, onnx_config
from spp_export.onnx_graph.decoder import Decoder
from spp_export.onnx_graph.options import OnnxOptions
from spp_export.onnx_graph.read import GraphWeights
from spp_export.onnx_graph.settings import stock_settings
from spp_export.onnx_graph.structure import difference
from spp_export.onnx_graph.write import GRAPH_NAME, optional_json
from spp_export.pipeline.compensation import (
    CONSUMERS,
    loses,
    real_columns,
    written_config,
    written_shape,
)
from spp_export.pipeline.onnx_files import check_version, onnx_options
from spp_export.plans import Plan
from spp_export.session import Session
from spp_export.slicing import written_tensor

if TYPE_CHECKING:
    from spp_export.reference import Projections
    from spp_export.verification import Check, VerifyReport


def check_onnx_directory(
    directory: Path, session: Session, compiled: Plan, prompts: Sequence[str], seed: int = 0
) -> VerifyReport:
    """Every check on a published graph, against the dense model and the plan."""
    from spp_export.onnx_checks import check_agreement, check_graph, check_logits, row_logits
    from spp_export.ort.model import OrtModel
    from spp_export.pipeline.verify import check_tokenizer, exact_dtype, session_batches
    from spp_export.verification import VerifyReport, reference_logits

    source, options = session.source, onnx_options(directory)
    check_version(directory)
    valid = check_graph(directory)
    if not valid.passed:
        return VerifyReport((valid,))
    promised = _promised(directory, source, compiled)
    form = _check_form(directory, promised, options)
    if not form.passed:
        return VerifyReport((valid, form))
    weights = GraphWeights(directory, source.family, promised.shape, promised.layers)
    held = _check_weights(source, compiled, weights, options)
    if not held.passed:
        return VerifyReport((valid, form, held))
    compensated = _compensated(source, compiled, weights)
    exact = exact_dtype(session, compensated)
    batches = session_batches(session, prompts, seed)
    with session.progress("checking against the masked dense model", None):
        reference = reference_logits(
            session.model,
            source.family,
            source.shape,
            compiled,
            batches,
            compensated,
            exact_dtype=exact,
        )
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
        "onnx": options.to_dict(),
    }
    return VerifyReport((valid, form, held, *checks), context)


def _promised(directory: Path, source: Source, compiled: Plan) -> Decoder:
    """The slim checkpoint that a plan makes of the source, without its weights."""
    layers = compiled.written_shapes(source.shape)
    config = written_config(source, compiled)
    counts = source.shape.layer if compiled.written_layout == "per-layer" else layers[0]
    shape = written_shape(source, compiled)
    nowhere = source.path / "model.safetensors"
    tensors = {
        spec.name: StoredTensor(spec.name, nowhere, source.dtype, spec.shape, 0, 0)
        for spec in source.family.tensors(shape, layers)
    }
    return Decoder(
        config=config,
        family=source.family,
        shape=replace(shape, query_heads=counts.query_heads, kv_heads=counts.kv_heads),
        layers=layers,
        layout=compiled.written_layout,
        settings=stock_settings(config, source.family, source.shape, directory),
        tensors=tensors,
    )


def _check_form(directory: Path, promised: Decoder, options: OnnxOptions) -> Check:
    """Configs and graph are those that spp writes for the plan."""
    from spp_export.verification import Check

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
    from spp_export.onnx_checks import check_weights

    dense = {spec.name: spec for spec in source.family.tensors(source.shape, source.shape.layers)}

    def kept(spec: TensorSpec) -> NDArray[Any] | None:
        if spec.name not in dense or _refitted(source, compiled, spec):
            return None
        whole = read_float(source.tensors[spec.name])
        return written_tensor(whole, dense[spec.name], compiled, source.shape)

    return check_weights("weights as the plan keeps them", weights, kept, options)


def _refitted(source: Source, compiled: Plan, spec: TensorSpec) -> bool:
    """Whether a tensor belongs to a projection that compensation changed."""
    if spec.layer is None or compiled.compensation == "none":
        return False
    family, layer = source.family, compiled.layers[spec.layer]
    return any(
        spec.name.startswith(f"{family.layer_name(spec.layer, family.consumer(role))}.")
        and loses(layer, role, source.shape)
        for role in CONSUMERS
    )


def _compensated(source: Source, compiled: Plan, weights: GraphWeights) -> Projections:
    """The compensated projections as the graph has them, for the oracle to put in place."""
    import torch

    from spp_export.reference import Projection

    has_bias = {
        spec.name
        for spec in source.family.tensors(
            written_shape(source, compiled), compiled.written_shapes(source.shape)
        )
        if spec.name.endswith(".bias")
    }
    found = {}
    for index, layer in enumerate(compiled.layers):
        for role in CONSUMERS:
            if compiled.compensation == "none" or not loses(layer, role, source.shape):
                continue
            module = source.family.layer_name(index, source.family.consumer(role))
            real = real_columns(compiled, index, role, source.shape)
            found_weight = weights.read(f"{module}.weight")[:, real]
            weight = torch.from_numpy(np.ascontiguousarray(found_weight))
            bias = None
            if f"{module}.bias" in has_bias:
                bias = torch.from_numpy(np.array(weights.read(f"{module}.bias")))
            found[index, role] = Projection(weight, bias)
    return found
