"""A slim or dense checkpoint as a checked GGUF directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.commands.gguf_files import gguf_config, shown_name
from spp_export.common.errors import OutputError
from spp_export.common.json_files import dump_json
from spp_export.common.progress import Progress, no_progress
from spp_export.formats.decoder import read_decoder
from spp_export.formats.gguf.contents import Contents, gguf_contents
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import write_gguf
from spp_export.formats.onnx.format import slim_reference
from spp_export.formats.promised import promised_decoder
from spp_export.models.checkpoint.companions import copy_companions
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.checkpoint.source import TOKENIZER_FILES, Source
from spp_export.planning import Plan

if TYPE_CHECKING:
    from torch import nn

    from spp_export.calibration.activations import TokenBatch
    from spp_export.commands.verify import Checked
    from spp_export.evaluation.parity import Check, ReferenceLogits
    from spp_export.models.session import Session

_BESIDE = ("generation_config.json", "tokenizer_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class GgufChecks:
    """What was found of a file; `weights` are None where its header is not what was promised."""

    checks: tuple[Check, ...]
    context: dict[str, Any] = field(default_factory=dict)
    weights: GgufWeights | None = None


def promised_contents(source: Source, compiled: Plan, options: GgufOptions) -> Contents:
    """What the file of a plan's slim model holds. ModelError where llama.cpp cannot run it."""
    decoder = promised_decoder(source.path, source, compiled)
    resolved = options.resolved(source.dtype)
    return gguf_contents(decoder, source.path, resolved, shown_name(compiled))


def write_gguf_files(
    checkpoint: Path, out: Path, contents: Contents, progress: Progress = no_progress
) -> None:
    """The file of a checkpoint, and beside it what is needed to talk to it and to check it."""
    decoder = read_decoder(checkpoint)
    with progress("writing the GGUF file", 1.0) as bar:
        write_gguf(decoder, contents, out, progress=lambda done, total: bar(done / max(total, 1)))
    try:
        config = dump_json(gguf_config(decoder, contents))
        (out / "config.json").write_text(config, encoding="utf-8")
        copy_companions(checkpoint, _BESIDE, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}).") from error


def check_gguf_files(
    directory: Path,
    checkpoint: Path,
    contents: Contents,
    batches: Sequence[TokenBatch],
    reference: Callable[[Sequence[TokenBatch]], ReferenceLogits],
    progress: Progress = no_progress,
) -> GgufChecks:
    """Every check on a file that was just written from `checkpoint`; `reference` gives the logits
    of its PyTorch model."""
    from spp_export.formats.gguf.checks import check_engine, check_header, check_weights

    file = read_gguf(directory)
    header = check_header(file, contents)
    if not header.passed:
        return GgufChecks((header,))
    weights = GgufWeights(file, contents.tensors)
    tensors = read_decoder(checkpoint).tensors
    held = check_weights(
        "weights as the checkpoint has them",
        weights,
        contents,
        lambda name: read_float(tensors[name]),
    )
    if not held.passed:
        return GgufChecks((header, held))
    with progress("checking the file in llama.cpp", None):
        engine = check_engine(directory, contents, batches, reference)
    checks = (header, held, *([engine.check] if engine.check else []))
    return GgufChecks(checks, gguf_context(contents, engine.context()), weights)


def gguf_context(contents: Contents, engine: dict[str, Any]) -> dict[str, Any]:
    """What verify.json says of a file beside the checks."""
    cost = {key: engine[key] for key in ("quantisation",) if key in engine}
    return {"gguf": {**contents.summary(), "engine": engine["engine"]}, **cost}


def check_exported_file(
    session: Session, checked: Checked, work: Path, contents: Contents
) -> GgufChecks:
    """Every check on the file in `work`, made from the checkpoint in `work/slim`, which was
    `checked` before.

    The slim model takes the file's weights, where these are less exact than its own, so that a
    quality measured next is the file's.
    """
    import torch

    from spp_export.commands.verify import exact_dtype

    assert checked.reference is not None
    slim, exact = work / "slim", exact_dtype(session, {})

    def reference(batches: Sequence[TokenBatch]) -> ReferenceLogits:
        disk = session.from_disk
        return slim_reference(slim, batches, exact, torch.float32, layerwise=disk)

    found = check_gguf_files(
        work, slim, contents, checked.reference.batches, reference, session.progress
    )
    if found.weights and checked.slim and contents.options.kind != "f32":
        if session.from_disk:
            found.context["gguf"]["quality_of"] = "the checkpoint that the file was made from"
        else:
            _take_weights(checked.slim, found.weights)
    return found


def _take_weights(model: nn.Module, weights: GgufWeights) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights.read(name)))
