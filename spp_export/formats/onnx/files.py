"""A slim or dense checkpoint as a checked ONNX directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, UsageError
from spp_export.common.progress import progress
from spp_export.formats.card import onnx_card
from spp_export.formats.dequantised import write_dequantised
from spp_export.formats.format import CardFacts, Comparison, FileChecks, ModelFiles
from spp_export.formats.onnx.engines import onnx_engines
from spp_export.formats.onnx.options import OnnxOptions, onnx_settings
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from spp_export.models.checkpoint.reader import read_float
from spp_export.planning import Plan

if TYPE_CHECKING:
    from spp_export.evaluation.parity import Check


class OnnxFiles(ModelFiles):
    """A graph, its weights and what engines want beside them."""

    nbytes: Mapping[str, int] = {}

    def __init__(self, options: OnnxOptions, checkpoint: Checkpoint, plan: Plan) -> None:
        onnx_settings(checkpoint, options)  # which refuses what no graph can express
        self._options, self._base = options, plan.model_source
        self.engines = onnx_engines(
            checkpoint.family.model_type, checkpoint.layout, **options.to_dict()
        )
        reason = options.reason(checkpoint.shape)
        self.summary = {**options.to_dict(), **({"reason": reason} if reason else {})}
        self.element_bytes = options.element_bytes
        self.torch_dtype = options.torch_dtype

    def write(self, checkpoint: Path, out: Path) -> None:
        with progress("writing the graph", 1.0) as bar:
            write_onnx(
                checkpoint,
                out,
                self._options,
                progress=lambda done, total: bar(done / max(total, 1)),
            )

    def check(self, out: Path, against: Comparison) -> FileChecks:
        """Every check. A quantised graph is compared with PyTorch's model of its own weights."""
        from spp_export.formats.onnx.checks import check_graph, check_logits, check_quantised
        from spp_export.formats.onnx.runtime.model import OrtModel
        from spp_export.formats.onnx.runtime.module import OrtModule

        options = self._options
        context: dict[str, Any] = {"onnx": self.summary}
        valid = check_graph(out)
        if not valid.passed:
            return FileChecks((valid,), context)
        held = _check_weights(out, against.checkpoint, options)
        if not held.passed:
            return FileChecks((valid, held), context)
        with progress("checking the graph in ONNX Runtime", None):
            checkpoint = against.checkpoint
            if options.quant:
                decoder = open_checkpoint(checkpoint)
                place = against.scratch / "dequantised"
                checkpoint = write_dequantised(decoder, _weights(out, decoder).read, place)
            reference = against.reference(checkpoint, against.batches)
            model = OrtModel.load(out, device=against.device)
            check = check_quantised if options.quant else check_logits
            checks = check(model, reference, options)
        module = OrtModule(model, against.device)
        return FileChecks((valid, held, *checks), context, module, options.quant is not None)

    def card(self, facts: CardFacts) -> str:
        return onnx_card(
            facts.name,
            self._base,
            self._options.attention,
            facts.report,
            self.engines,
            facts.license_name,
            facts.slim,
            facts.converted,
        )


def _weights(directory: Path, decoder: Checkpoint) -> GraphWeights:
    return GraphWeights(directory, decoder.family, decoder.shape, decoder.layers)


def _check_weights(directory: Path, checkpoint: Path, options: OnnxOptions) -> Check:
    """A graph's weights are those of the checkpoint that it was just made from."""
    from spp_export.formats.onnx.checks import check_weights

    decoder = open_checkpoint(checkpoint)
    return check_weights(
        "weights as the checkpoint has them",
        _weights(directory, decoder),
        lambda spec: read_float(decoder.tensors[spec.name]),
        options,
    )


def onnx_options(directory: Path) -> OnnxOptions:
    """The form of a directory's graph, from its config.json. Raises ModelError."""
    recorded = read_config(directory).get("spp_onnx")
    keys = ("attention", "precision", "quant")
    if not isinstance(recorded, dict) or not recorded.keys() >= set(keys):
        raise ModelError(
            f"{directory}: config.json has no spp_onnx, so the graph was not written by spp."
        )
    options = OnnxOptions(**{key: recorded[key] for key in keys})
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: spp_onnx of config.json is malformed: {error}") from error
    return options
