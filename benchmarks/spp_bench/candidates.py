"""Which models take part in a run, and what each of them is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spp_bench import gguf_weights
from spp_bench.bounds import Sizes
from spp_bench.onnx_weights import stored_weights
from spp_export.common.errors import OutputError
from spp_export.common.json_files import read_json
from spp_export.common.manifest import hash_file, require_export
from spp_export.formats.gguf.architecture import architecture_of
from spp_export.formats.gguf.files import gguf_options
from spp_export.formats.gguf.options import GGUF_NAME, GgufOptions
from spp_export.formats.gguf.tensors import gguf_tensors
from spp_export.formats.gguf.write import stored_bytes
from spp_export.formats.onnx.files import onnx_options
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.write import GRAPH_NAME
from spp_export.formats.promised import promised_checkpoint
from spp_export.formats.settings import stock_settings
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning import read_plan, validate_plan
from spp_export.planning.written import written_shape

EngineName = Literal["torch", "graph", "onnx", "genai", "gguf"]
# Of what is written for another engine than transformers.
Form = OnnxOptions | GgufOptions
DENSE = "dense"
PLAN_NAME = "plan.json"
GENAI_CONFIG = "genai_config.json"
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Out:
    """A directory to measure: a slim safetensors directory, or an ONNX or GGUF one.

    layers     what every layer has, by its plan
    shape      the dense model's, with the biases that compensation added
    plan_hash  SHA-256 of plan.json
    form       how the graph or the GGUF file was written; None for safetensors
    """

    name: str
    directory: Path
    layers: tuple[LayerShape, ...]
    shape: ModelShape
    plan_hash: str
    form: Form | None


@dataclass(frozen=True)
class Made:
    """A model of a published shape with random weights, dense or slim: nothing on disk.

    config  its config.json
    plan    layout, units, and the shares asked for and kept; None for the dense model
    """

    shape: str
    config: dict[str, Any]
    seed: int
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class Candidate:
    """One model on one engine: a row of the tables.

    baseline         name of the dense row that its speed-up is relative to; None for a dense row
    predicted_bytes  bytes of all weights, from the plan and dtype; None where a quantiser decides
    spare_tokens     tokens that the cache has room for beyond those that are fed
    cache_block      it has room for a multiple of so many tokens
    made             what the model is made of where no directory holds it
    """

    name: str
    engine: EngineName
    directory: Path
    sizes: Sizes
    precision: str
    baseline: str | None
    plan_hash: str | None
    predicted_bytes: int | None
    spare_tokens: int = 0
    cache_block: int = 1
    made: Made | None = None

    @property
    def dense(self) -> bool:
        """Whether it is a dense model."""
        return self.baseline is None

    def to_dict(self) -> dict[str, Any]:
        """For the results file; no paths, which would name the user's directories."""
        return {
            "name": self.name,
            "engine": self.engine,
            "precision": self.precision,
            "baseline": self.baseline,
            "plan_hash": self.plan_hash,
            "parameters": self.sizes.shape.parameters(self.sizes.layers),
            "read_bytes_per_step": self.sizes.read_bytes,
            **({"plan": self.made.plan} if self.made and self.made.plan else {}),
        }


def read_out(directory: Path, source: Checkpoint) -> Out:
    """What a directory holds. Raises OutputError or PlanError where that cannot be measured."""
    plan = directory / PLAN_NAME
    require_export(directory)
    compiled = read_plan(plan)
    validate_plan(compiled, source.shape, source.fingerprint)
    return Out(
        name=directory.resolve().name,
        directory=directory,
        layers=compiled.written_shapes(source.shape),
        shape=written_shape(source, compiled),
        plan_hash=hash_file(plan).sha256,
        form=_form_of(directory),
    )


def _form_of(directory: Path) -> Form | None:
    if (directory / GRAPH_NAME).exists():
        return onnx_options(directory)
    if (directory / GGUF_NAME).exists():
        return gguf_options(directory)
    return None


def torch_candidate(
    source: Checkpoint, out: Out | None, dtype: str, windows: Sequence[int | None]
) -> Candidate:
    """The row of transformers: of the dense model, or of a slim safetensors directory."""
    shape = out.shape if out else source.shape
    layers = out.layers if out else source.shape.layers
    size = _ELEMENT_BYTES[dtype]
    return Candidate(
        name=f"{out.name if out else DENSE} torch",
        engine="torch",
        directory=out.directory if out else source.path,
        sizes=Sizes(shape, layers, windows, size * shape.decode_parameters(layers), size, False),
        precision=dtype,
        baseline=f"{DENSE} torch" if out else None,
        plan_hash=out.plan_hash if out else None,
        predicted_bytes=size * shape.parameters(layers),
    )


def onnx_candidate(
    source: Checkpoint,
    out: Out | None,
    options: OnnxOptions,
    directory: Path,
    windows: Sequence[int | None],
) -> Candidate:
    """The row of ONNX Runtime: of the dense model in this form, or of an ONNX directory."""
    shape = out.shape if out else source.shape
    layers = out.layers if out else source.shape.layers
    size = options.element_bytes
    read = stored_weights(directory).read
    dense = f"{DENSE} onnx {form(options)}"
    return Candidate(
        name=f"{out.name} onnx" if out else dense,
        engine="onnx",
        directory=directory,
        sizes=Sizes(shape, layers, windows, read, size, True),
        precision=options.quant or options.precision,
        baseline=dense if out else None,
        plan_hash=out.plan_hash if out else None,
        predicted_bytes=None if options.quant else size * shape.parameters(layers),
    )


def gguf_candidate(
    source: Checkpoint,
    out: Out | None,
    options: GgufOptions,
    directory: Path,
    windows: Sequence[int | None],
) -> Candidate:
    """The row of llama.cpp: of the dense model in this form, or of a GGUF directory."""
    decoder = promised_checkpoint(source, read_plan(directory / PLAN_NAME)) if out else source
    tensors = gguf_tensors(decoder, architecture_of(decoder), options)
    form = options.quant or options.precision
    assert form is not None
    dense = f"{DENSE} gguf {form}"
    read = gguf_weights.stored_weights(directory).read
    return Candidate(
        name=f"{out.name} gguf" if out else dense,
        engine="gguf",
        directory=directory,
        sizes=Sizes(
            out.shape if out else source.shape,
            decoder.layers,
            windows,
            read,
            options.element_bytes,
            False,
        ),
        precision=form,
        baseline=dense if out else None,
        plan_hash=out.plan_hash if out else None,
        predicted_bytes=sum(map(stored_bytes, tensors)),
        spare_tokens=1,
        cache_block=gguf_weights.CACHE_BLOCK,
    )


def in_genai(candidate: Candidate) -> Candidate:
    """The same ONNX directory, run by onnxruntime-genai, which has room for the last token where
    past and present share a buffer."""
    settings = read_json(candidate.directory / GENAI_CONFIG, what="genai config", error=OutputError)
    return replace(
        candidate,
        name=candidate.name.replace(" onnx", " genai"),
        engine="genai",
        spare_tokens=int(settings["search"]["past_present_share_buffer"]),
        baseline=candidate.baseline and candidate.baseline.replace(" onnx", " genai"),
    )


def form(options: OnnxOptions) -> str:
    """A graph's form in a few words: gqa, gqa int4, standard fp16."""
    parts = [options.attention, options.precision if options.precision != "fp32" else None]
    return " ".join(part for part in (*parts, options.quant) if part)


def windows_of(source: Checkpoint) -> tuple[int | None, ...]:
    """Per layer, how many last tokens attention sees."""
    return stock_settings(source.config, source.family, source.shape, source.path).windows
