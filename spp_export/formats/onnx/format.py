"""A slim or dense checkpoint as a checked ONNX directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.progress import Progress, no_progress
from spp_export.formats.decoder import read_decoder
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.reader import read_float

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import Check, ReferenceLogits
    from spp_export.formats.onnx.runtime.model import OrtModel


@dataclass(frozen=True)
class GraphChecks:
    """What was found of a graph, and the running model if it came so far.

    agreement  of a quantised graph with the one it was made from: mean KL in nats, share of tokens
    """

    checks: tuple[Check, ...]
    model: OrtModel | None = None
    agreement: tuple[float, float] | None = None

    def quantisation(self) -> dict[str, Any]:
        """What quantising cost, for verify.json; empty for a graph that is not quantised."""
        from spp_export.evaluation.parity import rounded

        if self.agreement is None:
            return {}
        kl, share = self.agreement
        return {"quantisation": rounded({"mean_kl": kl, "top1": share})}


def write_graph(
    checkpoint: Path, out: Path, options: OnnxOptions, progress: Progress = no_progress
) -> None:
    """`write_onnx` with a progress bar."""
    with progress("writing the graph", 1.0) as bar:
        write_onnx(checkpoint, out, options, progress=lambda done, total: bar(done / max(total, 1)))


def check_graph_files(
    directory: Path,
    checkpoint: Path,
    reference: ReferenceLogits,
    options: OnnxOptions,
    *,
    device: str = "cpu",
    scratch: Path,
    progress: Progress = no_progress,
) -> GraphChecks:
    """Every check on a graph that was just written from `checkpoint`.

    A quantised graph is compared with an unquantised one, which is written to `scratch` and has to
    keep the tolerances of PyTorch's rounding itself.
    """
    from spp_export.formats.onnx.checks import (
        check_agreement,
        check_graph,
        check_logits,
        row_logits,
    )
    from spp_export.formats.onnx.runtime.model import OrtModel

    valid = check_graph(directory)
    if not valid.passed:
        return GraphChecks((valid,))
    held = _check_weights(directory, checkpoint, options)
    if not held.passed:
        return GraphChecks((valid, held))
    with progress("checking the graph in ONNX Runtime", None):
        model = OrtModel.load(directory, device=device)
        if options.quant is None:
            return GraphChecks(
                (valid, held, *check_logits(model, reference, options.precision)), model
            )
        plain = scratch / "unquantised"
        plain.mkdir()
        write_onnx(checkpoint, plain, replace(options, quant=None))
        unquantised = OrtModel.load(plain, device=device)
        checks = check_logits(unquantised, reference, options.precision)
        agreement, kl, share = check_agreement(
            f"{options.quant} graph against the unquantised one",
            zip(
                row_logits(unquantised, reference.batches),
                row_logits(model, reference.batches),
                strict=True,
            ),
        )
    shutil.rmtree(plain)
    return GraphChecks((valid, held, *checks, agreement), model, (kl, share))


def _check_weights(directory: Path, checkpoint: Path, options: OnnxOptions) -> Check:
    """A graph's weights are those of the checkpoint that it was just made from."""
    from spp_export.formats.onnx.checks import check_weights

    decoder = read_decoder(checkpoint)
    weights = GraphWeights(directory, decoder.family, decoder.shape, decoder.layers)
    return check_weights(
        "weights as the checkpoint has them",
        weights,
        lambda spec: read_float(decoder.tensors[spec.name]),
        options,
    )


def slim_reference(
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    exact: torch.dtype,
    same: torch.dtype,
    *,
    layerwise: bool = False,
) -> ReferenceLogits:
    """Logits of the PyTorch model of a checkpoint, in `exact` and in what a graph computes in."""
    from spp_export.evaluation.parity import ReferenceLogits, real_logits
    from spp_export.models.layerwise import open_layerwise
    from spp_export.models.loader import load_slim

    def logits(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        load = open_layerwise if layerwise else load_slim
        model = load(checkpoint, dtype)
        return tuple(real_logits(model, batches))

    return ReferenceLogits(tuple(batches), logits(exact), logits(same))
