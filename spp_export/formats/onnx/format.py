"""A slim or dense checkpoint as a checked ONNX directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, UsageError
from spp_export.common.progress import progress
from spp_export.formats.card import onnx_card
from spp_export.formats.decoder import Decoder, read_decoder
from spp_export.formats.format import Job, Verdict, _verdict
from spp_export.formats.onnx.companions import genai_config, onnx_config
from spp_export.formats.onnx.options import GRAPH_VERSION, OnnxOptions
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.structure import difference
from spp_export.formats.onnx.write import GRAPH_NAME, optional_json, write_onnx
from spp_export.formats.promised import compensated_projections, kept_of, promised_decoder
from spp_export.models.checkpoint.checkpoint import Checkpoint, read_config
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.engines import onnx_engines
from spp_export.models.hub import model_license
from spp_export.models.session import Session
from spp_export.planning import Plan

if TYPE_CHECKING:
    from spp_export.evaluation.parity import Check, ReferenceLogits, VerifyReport
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


def write_graph(checkpoint: Path, out: Path, options: OnnxOptions) -> None:
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


class _Onnx:
    files = ("model.onnx*",)

    def __init__(self, options: OnnxOptions, job: Job) -> None:
        self._options, self._job = options, job
        self.engines = onnx_engines(job.decoder.layout, **options.to_dict())
        self.form = options.to_dict()

    def write(self, work: Path) -> None:
        write_graph(self._job.checkpoint, work, self._options)

    def verify(self, work: Path, prompts: Sequence[str]) -> Verdict:
        import torch

        job = self._job
        own = getattr(torch, self._options.torch_dtype)
        scratch = work / "scratch"
        scratch.mkdir()
        found = check_graph_files(
            work,
            job.checkpoint,
            job.reference(job.batches(prompts), own),
            self._options,
            device=job.device,
            scratch=scratch,
        )
        shutil.rmtree(scratch)
        said = {"onnx": self._options.to_dict(), **found.quantisation()}
        return _verdict(found.checks, said)

    def card(self, name: str, report: Mapping[str, Any] | None) -> str:
        job = self._job
        base, form = job.plan.model_source, self._options.attention
        license_name = model_license(job.checkpoint)
        return onnx_card(
            name, base, form, report, self.engines, license_name, converted=job.slim_plan
        )


def is_onnx(directory: Path) -> bool:
    """Whether a directory holds a graph of ours, or something of that name."""
    return (directory / GRAPH_NAME).exists()


def onnx_options(directory: Path) -> OnnxOptions:
    """The form of a directory's graph, from its config.json. Raises ModelError."""
    said = read_config(directory).get("spp_onnx")
    keys = ("attention", "precision", "quant")
    if not isinstance(said, dict) or not said.keys() >= set(keys):
        raise ModelError(
            f"{directory}: config.json has no spp_onnx, so the graph was not written by spp."
        )
    options = OnnxOptions(**{key: said[key] for key in keys})
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: spp_onnx of config.json is malformed: {error}") from error
    return options


def check_version(directory: Path) -> None:
    """ModelError for a graph that another version of spp would have written otherwise."""
    said = read_config(directory).get("spp_onnx")
    version = said.get("version") if isinstance(said, dict) else None
    if version != GRAPH_VERSION:
        raise ModelError(
            f"{directory}: its graph is of version {version!r:.20}, this spp checks version "
            f"{GRAPH_VERSION}. Write it again, or verify it with the spp that wrote it."
        )


def graph_dtype(directory: Path) -> str:
    """The dtype in which PyTorch must compute to be compared with a graph."""
    return onnx_options(directory).torch_dtype


def check_onnx_directory(
    directory: Path, session: Session, compiled: Plan, prompts: Sequence[str], seed: int = 0
) -> VerifyReport:
    """Every check on a published graph, against the dense model and the plan."""
    from spp_export.evaluation.batches import exact_dtype, oracle_logits, session_batches
    from spp_export.evaluation.parity import VerifyReport
    from spp_export.formats.onnx.checks import (
        check_agreement,
        check_graph,
        check_logits,
        row_logits,
    )
    from spp_export.formats.onnx.runtime.model import OrtModel
    from spp_export.formats.safetensors.verify import check_tokenizer

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
    held = _check_kept_weights(source, compiled, weights, options)
    if not held.passed:
        return VerifyReport((valid, form, held))
    compensated = compensated_projections(source, compiled, weights.read)
    exact = exact_dtype(session, compensated)
    batches = session_batches(session, prompts, seed)
    with progress("checking against the masked dense model", None):
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


def _check_kept_weights(
    source: Checkpoint, compiled: Plan, weights: GraphWeights, options: OnnxOptions
) -> Check:
    """Weights are what the plan keeps of the source, but for what was compensated."""
    from spp_export.formats.onnx.checks import check_weights

    kept = kept_of(source, compiled)
    return check_weights("weights as the plan keeps them", weights, kept, options)
