"""`verify` of an ONNX directory: its weights against the dense model's, its logits too.

A graph holds everything that is needed to judge it. Its weights are read back and compared with
what the plan keeps of the dense model; the projections that were re-fitted, which only the graph
knows, take their place in the masked dense model, whose logits the graph must give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spp_export.checkpoint.reader import read_float
from spp_export.checkpoint.source import Source, read_config
from spp_export.families import TensorSpec
from spp_export.onnx_graph.companions import onnx_config
from spp_export.onnx_graph.options import OnnxOptions
from spp_export.onnx_graph.read import GraphWeights
from spp_export.onnx_graph.settings import stock_settings
from spp_export.pipeline.compensation import CONSUMERS, biased_roles, loses, written_shape
from spp_export.pipeline.onnx_files import onnx_options
from spp_export.plans import Plan
from spp_export.session import Session
from spp_export.slicing import slice_tensor
from spp_export.slim_config import slim_config

if TYPE_CHECKING:
    from spp_export.reference import Projections
    from spp_export.verification import Check, VerifyReport

# Energy of what rounding takes from a weight, as a share of its own, in the worst form: uniform
# over a step that is the block's range over 2^bits - 1, with room for blocks of uneven values.
_LOST_SHARE = {"fp32": 0.0, "fp16": 2.0**-10, "bf16": 2.0**-7}
_LOST_QUANTISED = {"int4": 0.25, "int8": 0.02, "int8-dynamic": 0.05}


def check_onnx_directory(
    directory: Path, session: Session, compiled: Plan, prompts: Sequence[str], seed: int = 0
) -> VerifyReport:
    """Every check on a published graph, against the dense model and the plan."""
    from spp_export.onnx_checks import check_agreement, check_graph, check_logits, row_logits
    from spp_export.ort.model import OrtModel
    from spp_export.pipeline.verify import check_tokenizer, exact_dtype, session_batches
    from spp_export.verification import VerifyReport, reference_logits

    source, options = session.source, onnx_options(directory)
    valid = check_graph(directory)
    if not valid.passed:
        return VerifyReport((valid,))
    shape = written_shape(source, compiled)
    layers = compiled.layer_shapes(source.shape)
    weights = GraphWeights(directory, source.family, shape, layers)
    held = _check_weights(directory, source, compiled, weights, options)
    if not held.passed:
        return VerifyReport((valid, held))
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
    return VerifyReport((valid, held, *checks), context)


def _check_weights(
    directory: Path, source: Source, compiled: Plan, weights: GraphWeights, options: OnnxOptions
) -> Check:
    """Config and weights are what the plan keeps of the source, but for what was compensated."""
    from spp_export.verification import Check

    name = "config and weights as the plan keeps them"
    if differs := _different_key(directory, source, compiled, options):
        return Check(name, False, detail=f"config.json differs from the plan in {differs}")
    dense = {spec.name: spec for spec in source.family.tensors(source.shape, source.shape.layers)}
    layers = compiled.layer_shapes(source.shape)
    slim = list(source.family.tensors(written_shape(source, compiled), layers))
    compared, largest = 0, 0.0
    for spec in slim:
        found = weights.read(spec.name)
        if found.shape != spec.shape or not np.isfinite(found).all():
            return Check(name, False, detail=f"{spec.name}: {list(found.shape)}, or not finite")
        if spec.name not in dense or _refitted(source, compiled, spec):
            continue
        kept = read_float(source.tensors[spec.name])
        if spec.layer is not None:
            kept = slice_tensor(kept, dense[spec.name], compiled.layers[spec.layer])
        lost = float(np.linalg.norm(found - kept) / max(float(np.linalg.norm(kept)), 1e-30))
        limit = _LOST_SHARE[options.precision]
        if options.quant and len(spec.shape) > 1:
            limit = _LOST_QUANTISED[options.quant]
        if not lost <= limit:
            return Check(
                name, False, lost, limit, f"{spec.name} is not what the plan keeps of the source"
            )
        compared, largest = compared + 1, max(largest, lost)
    detail = f"{compared} of {len(slim)} tensors, largest relative difference {largest:.2g}"
    return Check(name, True, detail=detail)


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


def _different_key(
    directory: Path, source: Source, compiled: Plan, options: OnnxOptions
) -> str | None:
    layers = compiled.layer_shapes(source.shape)
    roles = biased_roles(compiled, source.shape)
    checkpoint = slim_config(
        source.config, source.family, source.shape, layers, compiled.layout, roles
    )
    settings = stock_settings(checkpoint, source.family, source.shape, directory)
    counts = source.shape.layer if compiled.layout == "per-layer" else layers[0]
    shape = replace(source.shape, query_heads=counts.query_heads, kv_heads=counts.kv_heads)
    wanted = onnx_config(
        checkpoint,
        source.family,
        shape,
        layers,
        compiled.layout,
        options,
        settings.context_length,
    )
    found = read_config(directory)
    keys = sorted(found.keys() | wanted.keys())
    return next((key for key in keys if found.get(key) != wanted.get(key)), None)


def _compensated(source: Source, compiled: Plan, weights: GraphWeights) -> Projections:
    """The compensated projections as the graph has them, for the oracle to put in place."""
    import torch

    from spp_export.reference import Projection

    has_bias = {
        spec.name
        for spec in source.family.tensors(
            written_shape(source, compiled), compiled.layer_shapes(source.shape)
        )
        if spec.name.endswith(".bias")
    }
    found = {}
    for index, layer in enumerate(compiled.layers):
        for role in CONSUMERS:
            if compiled.compensation == "none" or not loses(layer, role, source.shape):
                continue
            module = source.family.layer_name(index, source.family.consumer(role))
            weight = torch.from_numpy(np.ascontiguousarray(weights.read(f"{module}.weight")))
            bias = None
            if f"{module}.bias" in has_bias:
                bias = torch.from_numpy(np.array(weights.read(f"{module}.bias")))
            found[index, role] = Projection(weight, bias)
    return found
