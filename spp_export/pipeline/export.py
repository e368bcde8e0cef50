"""`export`: the main job. Diagnose, plan, slice, compensate, write, verify, publish."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spp_export.artifacts import Artifacts
from spp_export.bound import Predicted, predicted
from spp_export.card import model_card, onnx_card
from spp_export.checkpoint.atomic import check_target, publish
from spp_export.checkpoint.manifest import write_manifest
from spp_export.checkpoint.reader import model_file
from spp_export.checkpoint.slim import WrittenWeights, write_slim_weights
from spp_export.checkpoint.source import TOKENIZER_FILES
from spp_export.diagnosis import Diagnosis
from spp_export.engines import Engine, onnx_engines
from spp_export.errors import (
    CheckFailed,
    ModelError,
    ParityError,
    PlanError,
    QualityError,
    UsageError,
)
from spp_export.jsonio import dump_json, read_json
from spp_export.models import DEMO, model_license
from spp_export.onnx_graph.options import OnnxOptions, require_all
from spp_export.pipeline.calibration import Mixing, calibration_parts, gather_parts
from spp_export.pipeline.compensation import (
    Compensation,
    moment_kinds,
    written_config,
    written_shape,
)
from spp_export.pipeline.onnx_export import (
    GraphChecks,
    check_graph_files,
    slim_reference,
    write_graph,
)
from spp_export.pipeline.plan import (
    PlanRequest,
    PlanResult,
    artifacts_record,
    plan_scenario,
    plan_tensors,
    requested_mixing,
    scenario_record,
)
from spp_export.pipeline.verify import Checked, check_directory, exact_dtype
from spp_export.plans import Plan, read_plan, validate_plan
from spp_export.progress import Progress, no_progress
from spp_export.scenario import Scenario, read_scenario
from spp_export.session import Session, open_artifacts, open_session
from spp_export.shape import ModelShape
from spp_export.slim_config import MODELING_FILES

# What a Hugging Face directory has beside weights and config, where the source has it.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer_config.json",
    *TOKENIZER_FILES,
    "LICENSE",
)


@dataclass(frozen=True)
class ExportRequest:
    """What the user may ask of an export, beside the plan. `onnx` None writes safetensors.

    pad: fill the groups of ragged layers with heads of zeros, so that the layers are regular.
    """

    force: bool = False
    verify: bool = True
    keep_failed: bool = False
    dry_run: bool = False
    max_perplexity_ratio: float | None = None
    seed: int = 0
    onnx: OnnxOptions | None = None
    pad: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was decided, written and found. `path` is None for a dry run."""

    path: Path | None
    plan: Plan
    shape: ModelShape
    diagnosis: Diagnosis | None
    predicted: Predicted
    engines: tuple[Engine, ...]
    tensors: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    onnx: OnnxOptions | None = None
    graph_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        kept = [len(layer.query_heads) for layer in self.plan.layers]
        return {
            "path": None if self.path is None else str(self.path),
            "format": "onnx" if self.onnx else "safetensors",
            "onnx": {**self.onnx.to_dict(), "bytes": self.graph_bytes} if self.onnx else None,
            "layout": self.plan.layout,
            "padded": self.plan.padded,
            "compensation": self.plan.compensation,
            "diagnosis": self.diagnosis.to_dict() if self.diagnosis else None,
            "kept_query_heads": kept,
            "kept_kv_heads": [len(layer.kv_heads) for layer in self.plan.layers],
            "kept_channels": [layer.shape(self.shape).channels for layer in self.plan.layers],
            "dense_heads": {"query": self.shape.query_heads, "kv": self.shape.kv_heads},
            "dense_channels": self.shape.channels,
            "budget": dict(self.plan.budget),
            "predicted": self.predicted.as_json(),
            "verify": self.report,
            "engines": [engine.to_dict() for engine in self.engines],
            "tensors": [dict(tensor) for tensor in self.tensors] if self.path is None else None,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


def export(
    scenario: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    plan_request: PlanRequest | None = None,
    request: ExportRequest | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Write the slim checkpoint of a scenario, or of a given plan, checked and published whole.

    `output` defaults to `out/<scenario name>`. Raises ParityError or QualityError when a check
    does not hold: then nothing is published unless `keep_failed`.
    """
    request = request or ExportRequest()
    plan_request = plan_request or PlanRequest()
    plan_request.check()
    if scenario is None and plan is None:
        raise UsageError("export needs --scenario FILE or --plan FILE.")
    if plan is not None and plan_request != PlanRequest():
        raise UsageError("--plan FILE decides by itself; leave out the options of 'spp plan'.")
    if request.max_perplexity_ratio is not None and (request.dry_run or not request.verify):
        raise UsageError("--max-perplexity needs the checks; leave out --dry-run and --no-verify.")
    if plan is None:
        _check_layout(plan_request.layout, request.pad, request)
    if request.onnx:
        require_all()
        # What nothing here can run can still be written, where nobody asks for the checks.
        request.onnx.check(device if request.verify and not request.dry_run else None)
    clock = _Clock()
    text = None if scenario is None else read_scenario(scenario)
    target = Path(output) if output is not None else default_output(text)
    if not request.dry_run:
        check_target(target, request.force)
    session = open_session(model, device=device, dtype=dtype, progress=progress)
    found = _artifacts(artifacts, model, session, needed=plan is None)
    with clock("plan"):
        decided = _decide(session, found, text, plan, plan_request)
        if plan is not None:
            _check_layout(decided.plan.layout, request.pad or decided.plan.padded, request)
        if request.pad:
            decided = _padded(decided, session)
    compiled = decided.plan
    shape = session.source.shape
    result = ExportResult(
        path=None,
        plan=compiled,
        shape=shape,
        diagnosis=decided.diagnosis,
        predicted=decided.predicted,
        engines=decided.engines,
        tensors=plan_tensors(session, compiled),
        seconds=clock.seconds,
    )
    if request.onnx:
        result = _as_onnx(result, session, request.onnx)
    if request.dry_run:
        return result
    failure: CheckFailed | None = None
    report: dict[str, Any] | None = None
    with publish(target, request.force) as work:
        # A graph is made from a slim checkpoint, which is checked like any and then thrown away.
        slim = work if request.onnx is None else work / "slim"
        slim.mkdir(exist_ok=True)
        with clock("compensate"):
            compensation = _compensation(session, found, compiled, text, plan_request)
        with clock("slice"):
            written = _write(session, compiled, compensation, slim)
        if request.onnx:
            with clock("graph"):
                write_graph(slim, work, request.onnx, session.progress)
        if request.verify:
            with clock("verify"):
                report, failure = _verify(session, compiled, text, work, request, compensation)
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not request.keep_failed:
                raise failure
        (work / "README.md").write_text(
            _card(target.name, session, result, report), encoding="utf-8"
        )
        if request.onnx:
            shutil.copyfile(slim / "plan.json", work / "plan.json")
            if (slim / "LICENSE").exists():
                shutil.copyfile(slim / "LICENSE", work / "LICENSE")
            shutil.rmtree(slim)
            sizes = (path.stat().st_size for path in work.glob("model.onnx*"))
            result = replace(result, graph_bytes=sum(sizes))
        write_manifest(work, None if request.onnx else written.records)
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    return replace(result, path=target, report=report)


def _as_onnx(result: ExportResult, session: Session, options: OnnxOptions) -> ExportResult:
    """Engines of a graph, and sizes in its precision."""
    source, compiled = session.source, result.plan
    size = options.element_bytes
    dense = replace(source.shape, element_bytes=size)
    written = replace(written_shape(source, compiled), element_bytes=size)
    return replace(
        result,
        onnx=options,
        predicted=predicted(dense, compiled.written_shapes(source.shape), written),
        engines=onnx_engines(compiled.written_layout, **options.to_dict()),
    )


def _card(
    name: str, session: Session, result: ExportResult, report: Mapping[str, Any] | None
) -> str:
    license_name = model_license(session.source.path)
    sizes = result.plan, result.shape, result.predicted
    if result.onnx is None:
        return model_card(name, *sizes, report, result.engines, license_name)
    base = result.plan.model_source
    form = result.onnx.attention
    return onnx_card(name, base, form, report, result.engines, license_name, sizes)


def default_output(scenario: Scenario | None) -> Path:
    """`out/<name>` for a scenario file `<name>.txt`."""
    if scenario is None:
        raise UsageError("-o is missing: say where the export goes.")
    return Path("out") / Path(scenario.name).stem


def _check_layout(layout: str, pad: bool, request: ExportRequest) -> None:
    """UsageError for zeros that have nowhere to go, or a graph whose groups would differ."""
    if pad and layout != "ragged":
        raise UsageError(f"--pad fills the groups of ragged layers; this layout is {layout}.")
    if request.onnx and layout == "ragged" and not pad:
        raise UsageError(
            "--format onnx needs groups of the same size in a layer. Add --pad to fill those of a "
            "ragged layout with zeros."
        )


def _padded(decided: PlanResult, session: Session) -> PlanResult:
    """The same heads, to be written with zeros beside them."""
    source, compiled = session.source, replace(decided.plan, padded=True)
    layers = compiled.written_shapes(source.shape)
    sizes = predicted(source.shape, layers, written_shape(source, compiled))
    return replace(decided, plan=replace(compiled, predicted=sizes.as_json()), predicted=sizes)


def _artifacts(
    artifacts: str | os.PathLike[str] | None, model: str, session: Session, *, needed: bool
) -> Artifacts | None:
    if artifacts is None and model != DEMO and not needed:
        return None
    return open_artifacts(artifacts, model, session.source)


def _decide(
    session: Session,
    artifacts: Artifacts | None,
    scenario: Scenario | None,
    plan: str | os.PathLike[str] | Plan | None,
    request: PlanRequest,
) -> PlanResult:
    """The plan given, or the one compiled from the scenario."""
    if plan is None:
        assert artifacts is not None
        assert scenario is not None
        return plan_scenario(session, artifacts, scenario, request)
    given = plan if isinstance(plan, Plan) else read_plan(plan)
    source = session.source
    validate_plan(given, source.shape, source.fingerprint)
    if given.compensation != "none":
        # These decide the re-fit, whatever the plan was made for.
        if scenario is not None:
            given = replace(given, scenario=scenario_record(scenario))
        if artifacts is not None:
            given = replace(given, artifacts=artifacts_record(artifacts))
    layers = given.written_shapes(source.shape)
    sizes = predicted(source.shape, layers, written_shape(source, given))
    return PlanResult(given, source.shape, None, sizes)


def _compensation(
    session: Session,
    artifacts: Artifacts | None,
    compiled: Plan,
    scenario: Scenario | None,
    request: PlanRequest,
) -> Compensation:
    if compiled.compensation == "none":
        return Compensation(session.source, compiled, None)
    prompts = scenario.split()[0] if scenario else ()
    mixing = _mixing(compiled) or requested_mixing(artifacts, request)
    parts = calibration_parts(artifacts, compiled.diagnosis.get("mixture"), prompts, mixing)
    moments = gather_parts(session, parts, moment_kinds(compiled, session.source.shape))
    return Compensation(session.source, compiled, moments)


def _mixing(compiled: Plan) -> Mixing | None:
    """How the text that decided the plan was mixed, if the plan says so."""
    if not compiled.calibration:
        return None
    values: list[float] = []
    for key in ("shrinkage", "scenario_weight"):
        value: Any = compiled.calibration.get(key)
        # A plan's provenance may be edited by hand like the rest of it.
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise PlanError(
                f"plan: calibration.{key} must be a number from 0 to 1, got {value!r:.40}. "
                "Leave out calibration for the usual mixture."
            )
        values.append(float(value))
    return Mixing(*values)


def _write(
    session: Session, compiled: Plan, compensation: Compensation, work: Path
) -> WrittenWeights:
    source = session.source
    with session.progress("slicing", 1.0) as bar:
        written = write_slim_weights(
            source,
            compiled,
            work,
            replaced=compensation.refit,
            biases=compensation.biases(),
            progress=lambda done, total: bar(done / total),
        )
    config = written_config(source, compiled)
    (work / "config.json").write_text(dump_json(config), encoding="utf-8")
    if compiled.layout != "uniform":
        for path in MODELING_FILES:
            shutil.copyfile(path, work / path.name)
    for name in _COMPANIONS:
        if (source.path / name).exists():
            _copy_companion(model_file(source.path, name), work / name)
    (work / "plan.json").write_text(compiled.to_json(), encoding="utf-8")
    return written


def _copy_companion(source: Path, target: Path) -> None:
    """A file as it is, but for code that a tokenizer names: whoever trusts an export's own code, as
    the card of a per-layer one says, would run that too."""
    if target.name == "tokenizer_config.json":
        settings = read_json(source, what="tokenizer config", error=ModelError)
        if isinstance(settings, dict) and "auto_map" in settings:
            del settings["auto_map"]
            target.write_text(dump_json(settings), encoding="utf-8")
            return
    shutil.copyfile(source, target)


def _verify(
    session: Session,
    compiled: Plan,
    scenario: Scenario | None,
    work: Path,
    request: ExportRequest,
    compensation: Compensation,
) -> tuple[dict[str, Any], CheckFailed | None]:
    """verify.json's content, and the error if the answer is no."""
    from spp_export.quality import measure_quality
    from spp_export.verification import rounded

    prompts = scenario.prompts if scenario else ()
    slim = work if request.onnx is None else work / "slim"
    checked = check_directory(slim, session, compiled, prompts, request.seed, compensation)
    content, model = checked.report.to_dict(), checked.slim
    failed = list(checked.report.failures)
    if request.onnx and not failed:
        found = _check_graph(session, checked, work, request.onnx)
        content["checks"] += [check.to_dict() for check in found.checks]
        content["onnx"] = request.onnx.to_dict()
        content |= found.quantisation()
        failed = [check for check in found.checks if not check.passed]
        if found.model and not failed:
            from spp_export.ort.module import OrtModule

            model = OrtModule(found.model, session.device)
    if failed or model is None:
        content["passed"] = False
        first = failed[0]
        return content, ParityError(
            f"{first.name}: {first.describe()} Nothing to change in the options helps: "
            "this is a defect of spp or of the checkpoint."
        )
    held_out = scenario.split()[1] if scenario else ()
    quality = (
        measure_quality(
            session.model, model, session.tokenizer, held_out, progress=session.progress
        )
        if held_out
        else None
    )
    content["quality"] = rounded(quality.to_dict()) if quality else None
    limit = request.max_perplexity_ratio
    if limit is None:
        return content, None
    within = quality is not None and quality.ratio <= limit
    content["quality_gate"] = {"max_perplexity_ratio": limit, "passed": within}
    content["passed"] = content["passed"] and within
    if quality is None:
        return content, QualityError(
            "the quality gate needs held-out text: a scenario of at least four prompts."
        )
    if not within:
        return content, QualityError(
            f"held-out perplexity is {quality.ratio:.3f}x dense, the gate allows {limit:g}x. "
            "Keep more (--keep) or raise the gate."
        )
    return content, None


def _check_graph(
    session: Session, checked: Checked, work: Path, options: OnnxOptions
) -> GraphChecks:
    """A graph against the oracle that its checkpoint was compared with, in its own precision."""
    assert checked.reference is not None
    reference, slim = checked.reference, work / "slim"
    if options.torch_dtype != session.dtype:
        reference = slim_reference(slim, reference.batches, exact_dtype(session, {}), options)
    return check_graph_files(
        work,
        slim,
        reference,
        options,
        device=session.device,
        scratch=slim,
        progress=session.progress,
    )


class _Clock:
    """Seconds of wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - start
