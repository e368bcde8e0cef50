"""ONNX, as the commands know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.formats.format import FileChecks, Format, Library, ModelFiles, Promise, RunningModel
from spp_export.formats.onnx.engines import onnx_engines
from spp_export.formats.onnx.options import ATTENTIONS, KNOWN, PRECISIONS, OnnxOptions
from spp_export.models.engines import Engine

if TYPE_CHECKING:
    from spp_export.models.checkpoint.checkpoint import Checkpoint
    from spp_export.models.families import Family
    from spp_export.models.shape import LayerShape, Layout
    from spp_export.planning import Plan


class Onnx(Format[OnnxOptions]):
    """A graph for ONNX Runtime, and what other engines of ONNX want beside it."""

    name = "onnx"
    title = "ONNX"
    kind = "ONNX export"
    engine = "ONNX Runtime"
    options = OnnxOptions
    weights = "model.onnx*"
    marker = "model.onnx"
    libraries = (
        Library("onnx", "onnx", "--format onnx", "onnx"),
        Library("onnx-ir", "onnx_ir", "--format onnx", "onnx"),
        Library("onnxruntime", "onnxruntime", "ONNX on the CPU", "onnx"),
        Library("onnxruntime-gpu", "onnxruntime", "ONNX on CUDA", "onnx-gpu"),
        Library("onnxruntime-genai", "onnxruntime_genai", "another engine for ONNX directories"),
        Library("optimum-onnx", "optimum.onnxruntime", "ORTModelForCausalLM", "optimum"),
    )
    required = ("onnx", "onnx_ir", "onnxruntime")
    runs = ("onnxruntime",)

    def refusal(self, family: Family, layout: Layout) -> str | None:
        from spp_export.formats.settings import features_refusal

        layouts = super().refusal(family, layout)
        return layouts or features_refusal(family, KNOWN, "ONNX")

    def prepare(self, options: OnnxOptions, checkpoint: Checkpoint, plan: Plan) -> ModelFiles:
        from spp_export.formats.onnx.files import OnnxFiles

        return OnnxFiles(options, checkpoint, plan)

    def disk(
        self, options: OnnxOptions, stored_dtype: str, parameters: int, verify: bool
    ) -> dict[str, int]:
        """Bytes of a graph, and of the unquantised one that a quantised one is compared with."""
        from spp_export.formats.onnx.quantise import QUANTISED_BYTES

        plain = options.element_bytes * parameters
        if options.quant is None:
            return {"graph": plain}
        graph = round(QUANTISED_BYTES[options.quant] * parameters)
        return {"graph": graph, "graph to compare with": plain if verify else 0}

    def working_bytes(self, options: OnnxOptions) -> int:
        return options.element_bytes

    def verify_dtype(self, directory: Path) -> str | None:
        from spp_export.formats.onnx.files import onnx_options

        return onnx_options(directory).torch_dtype

    def verify(self, directory: Path, against: Promise) -> FileChecks:
        from spp_export.formats.onnx.verify import check_onnx_directory

        return check_onnx_directory(directory, against)

    def facts(self, directory: Path) -> dict[str, Any]:
        from spp_export.formats.onnx.files import onnx_options

        form = onnx_options(directory)
        return {
            "attention": form.attention,
            "precision": form.precision,
            "quant": form.quant or "none",
            "graph_bytes": sum(file.stat().st_size for file in directory.glob(self.weights)),
        }

    def engines_for(
        self, config: Mapping[str, Any], layout: str, layers: Sequence[LayerShape]
    ) -> tuple[Engine, ...]:
        written = config.get("spp_onnx")
        if not isinstance(written, Mapping):
            return ()
        attention, precision = written.get("attention"), written.get("precision")
        if attention not in ATTENTIONS or precision not in PRECISIONS:
            return ()
        quant = written.get("quant")
        name = str(config.get("model_type"))
        return onnx_engines(name, layout, attention, precision, quant if quant else None)

    def describe(self, summary: Mapping[str, Any], size: str) -> list[str]:
        quant = summary["quant"] or "not quantised"
        lines = [f"ONNX graph: {summary['attention']}, {summary['precision']}, {quant}, {size}"]
        if reason := summary.get("reason"):
            lines.append(f"attention {summary['attention']}: {reason}")
        return lines

    def run(
        self, directory: Path, *, device: str, dtype: str | None, threads: int | None
    ) -> RunningModel:
        from spp_export.formats.onnx.run import load_onnx

        return load_onnx(directory, device, dtype, threads)
