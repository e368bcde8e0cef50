"""A slim or dense checkpoint as a checked GGUF directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, OutputError, UsageError
from spp_export.common.json_files import dump_json
from spp_export.common.progress import progress
from spp_export.evaluation.batches import slim_reference
from spp_export.formats.card import gguf_card
from spp_export.formats.decoder import Decoder, read_decoder
from spp_export.formats.format import Job, Verdict, _verdict
from spp_export.formats.gguf.contents import Contents, gguf_contents
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.options import FILE_VERSION, GGUF_NAME, GgufOptions, require
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import write_gguf
from spp_export.formats.promised import compensated_projections, kept_of, promised_decoder
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint, read_config
from spp_export.models.checkpoint.companions import copy_companions
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.engines import gguf_engines
from spp_export.models.hub import model_license
from spp_export.models.session import Session
from spp_export.planning import Plan
from spp_export.planning.written import written_shape

if TYPE_CHECKING:
    from torch import nn

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import Check, ReferenceLogits, VerifyReport
    from spp_export.formats.safetensors.verify import Checked
    from spp_export.models.session import Session

_BESIDE = ("generation_config.json", "tokenizer_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class GgufChecks:
    """What was found of a file; `weights` are None where its header is not what was promised."""

    checks: tuple[Check, ...]
    context: dict[str, Any] = field(default_factory=dict)
    weights: GgufWeights | None = None


def promised_contents(source: Checkpoint, compiled: Plan, options: GgufOptions) -> Contents:
    """What the file of a plan's slim model holds. ModelError where llama.cpp cannot run it."""
    decoder = promised_decoder(source.path, source, compiled)
    resolved = options.resolved(source.dtype)
    return gguf_contents(decoder, source.path, resolved, shown_name(compiled))


def write_gguf_files(checkpoint: Path, out: Path, contents: Contents) -> None:
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

    from spp_export.evaluation.batches import exact_dtype

    assert checked.reference is not None
    slim, exact = work / "slim", exact_dtype(session, {})

    def reference(batches: Sequence[TokenBatch]) -> ReferenceLogits:
        disk = session.from_disk
        return slim_reference(slim, batches, exact, torch.float32, layerwise=disk)

    found = check_gguf_files(work, slim, contents, checked.reference.batches, reference)
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


class _Gguf:
    files = (GGUF_NAME,)

    def __init__(self, options: GgufOptions, job: Job) -> None:
        self._job = job
        name = shown_name(job.plan)
        self._contents = gguf_contents(job.decoder, job.checkpoint, options, name)
        self.engines = gguf_engines(self._contents.architecture.name)
        self.form = self._contents.summary()

    def write(self, work: Path) -> None:
        write_gguf_files(self._job.checkpoint, work, self._contents)

    def verify(self, work: Path, prompts: Sequence[str]) -> Verdict:
        import torch

        job = self._job
        found = check_gguf_files(
            work,
            job.checkpoint,
            self._contents,
            job.batches(prompts),
            lambda batches: job.reference(batches, torch.float32),
        )
        return _verdict(found.checks, found.context)

    def card(self, name: str, report: Mapping[str, Any] | None) -> str:
        job = self._job
        license_name = model_license(job.checkpoint)
        base = job.plan.model_source
        return gguf_card(
            name, base, self.form, report, self.engines, license_name, converted=job.slim_plan
        )


_KEY = "spp_gguf"


def is_gguf(directory: Path) -> bool:
    """Whether a directory holds a GGUF file of ours, or something of that name."""
    return (directory / GGUF_NAME).exists()


def gguf_config(decoder: Decoder, contents: Contents) -> dict[str, Any]:
    """config.json of a GGUF directory, which says how the file was written."""
    said = {
        "architecture": contents.architecture.name,
        **contents.options.to_dict(),
        "layout": decoder.layout,
        "version": FILE_VERSION,
    }
    family = decoder.family
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        _KEY: said,
    }


def gguf_options(directory: Path) -> GgufOptions:
    """The form of a directory's file, from its config.json.

    Raises ModelError where spp did not write it, or another version that would write it otherwise.
    """
    said = read_config(directory).get(_KEY)
    if not isinstance(said, dict) or not said.keys() >= {"precision", "quant"}:
        raise ModelError(
            f"{directory}: config.json has no {_KEY}, so the file was not written by spp."
        )
    if said.get("version") != FILE_VERSION:
        raise ModelError(
            f"{directory}: its GGUF is of version {said.get('version')!r:.20}, this spp checks "
            f"version {FILE_VERSION}. Write it again, or verify it with the spp that wrote it."
        )
    options = GgufOptions(said["precision"], said["quant"])
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: {_KEY} of config.json is malformed: {error}") from error
    if options == GgufOptions():
        raise ModelError(f"{directory}: {_KEY} of config.json names neither precision nor quant.")
    return options


def shown_name(compiled: Plan) -> str:
    """What programs that run the file call the model."""
    return f"{PurePosixPath(compiled.model_source).name} (spp)"


def check_gguf_directory(
    directory: Path, session: Session, compiled: Plan, prompts: Sequence[str], seed: int = 0
) -> VerifyReport:
    """Every check on a published file, against the dense model and the plan."""
    from spp_export.evaluation.batches import exact_dtype, oracle_logits, session_batches
    from spp_export.evaluation.parity import VerifyReport
    from spp_export.formats.gguf.checks import check_engine, check_header, check_weights
    from spp_export.formats.safetensors.verify import check_tokenizer

    require()
    source = session.source
    contents = promised_contents(source, compiled, gguf_options(directory))
    file = read_gguf(directory)
    header = check_header(file, contents)
    if not header.passed:
        return VerifyReport((header,))
    weights = GgufWeights(file, contents.tensors)
    layers, kept = compiled.written_shapes(source.shape), kept_of(source, compiled)
    specs = {s.name: s for s in source.family.tensors(written_shape(source, compiled), layers)}
    held = check_weights(
        "weights as the plan keeps them", weights, contents, lambda name: kept(specs[name])
    )
    if not held.passed:
        return VerifyReport((header, held))
    compensated = compensated_projections(source, compiled, weights.read)
    exact = exact_dtype(session, compensated)

    def reference(batches: Sequence[TokenBatch]) -> ReferenceLogits:
        return oracle_logits(session, compiled, batches, compensated, exact)

    batches = session_batches(session, prompts, seed)
    with progress("checking against the masked dense model", None):
        engine = check_engine(directory, contents, batches, reference)
    checks = [header, held, *([engine.check] if engine.check else [])]
    if prompts:
        checks.append(check_tokenizer(directory, session, prompts))
    context = {
        "reference": str(exact).removeprefix("torch."),
        "computed_in": session.dtype,
        "layerwise": session.from_disk,
        **gguf_context(contents, engine.context()),
    }
    return VerifyReport(tuple(checks), context)
