"""`export`: the main job. Diagnose, plan, slice, compensate, write, verify, publish."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from spp_export.commands.export_checks import as_gguf, as_onnx, check_export, export_card
from spp_export.commands.export_request import ExportRequest, ExportResult
from spp_export.commands.needs import (
    Needs,
    check_disk,
    check_memory,
    check_place,
    check_readable,
    export_needs,
    least_slim_bytes,
)
from spp_export.commands.push import PushResult, check_hub, push_to_hub
from spp_export.common.errors import (
    CheckFailed,
    OutputError,
    UsageError,
)
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.formats.gguf.format import (
    write_gguf_files,
)
from spp_export.formats.gguf.options import GGUF_NAME
from spp_export.formats.gguf.options import require as require_gguf
from spp_export.formats.onnx.format import (
    write_graph,
)
from spp_export.formats.onnx.options import require_all
from spp_export.formats.safetensors.write import COMPANIONS, write_slim
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.planning import Plan, read_plan, validate_plan
from spp_export.planning.bound import predicted
from spp_export.planning.budget import DEFAULT_KEEP
from spp_export.planning.planner import (
    artifacts_record,
    plan_scenario,
    plan_tensors,
    scenario_record,
)
from spp_export.planning.request import PlanRequest, PlanResult
from spp_export.planning.written import written_shape
from spp_export.slicing.compensation import Compensator, plan_compensation
from spp_export.slicing.weights import WrittenWeights


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
    layerwise: bool | None = None,
) -> ExportResult:
    """Write the slim checkpoint of a scenario, or of a given plan, checked and published whole.

    `output` defaults to `out/<scenario name>`. `layerwise` is as of `verify`. Raises ParityError or
    QualityError when a check does not hold: then nothing is published unless `keep_failed`.
    """
    request = request or ExportRequest()
    plan_request = plan_request or PlanRequest()
    _check_requests(request, plan_request, scenario, plan)
    _check_format(request, device)
    text = None if scenario is None else read_scenario(scenario)
    target = Path(output) if output is not None else default_output(text)
    if not request.dry_run:
        check_target(target, request.force)
        check_place(target)
    session = open_session(model, device=device, dtype=dtype, layerwise=layerwise)
    found = _artifacts(artifacts, model, session, needed=plan is None)
    _preflight(session, target, request, plan_request if plan is None else None)
    job = _Job(session, found, text, plan_request, request, _Clock())
    result = job.decide(plan, target)
    if request.dry_run:
        return result
    assert result.needs
    check_disk(result.needs)
    with publish(target, request.force) as work:
        result, failure = job.fill(work, result, target.name)
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    result = replace(result, path=target)
    if request.push_to_hub is None:
        return result
    with job.clock("push"):
        return replace(result, pushed=_push(target, request, request.push_to_hub))


@dataclass(frozen=True)
class _Job:
    """One export: what it is made of, what was asked, and the time it takes."""

    session: Session
    artifacts: Artifacts | None
    text: Scenario | None
    plan_request: PlanRequest
    request: ExportRequest
    clock: _Clock

    def decide(self, plan: str | os.PathLike[str] | Plan | None, target: Path) -> ExportResult:
        """The plan, given or compiled, and what it will come to."""
        session, request = self.session, self.request
        with self.clock("plan"):
            decided = _decide(session, self.artifacts, self.text, plan, self.plan_request)
            if plan is not None:
                _check_layout(decided.plan.layout, request.pad or decided.plan.padded, request)
            if request.pad:
                decided = _padded(decided, session)
        result = ExportResult(
            path=None,
            plan=decided.plan,
            shape=session.source.shape,
            diagnosis=decided.diagnosis,
            predicted=decided.predicted,
            engines=decided.engines,
            tensors=plan_tensors(session, decided.plan),
            seconds=self.clock.seconds,
            needs=_needs(
                session,
                target,
                decided.predicted.file_bytes,
                request,
                runs_model=plan is None or decided.plan.compensation != "none",
            ),
        )
        if request.onnx:
            result = as_onnx(result, session, request.onnx)
        return as_gguf(result, session, request.gguf) if request.gguf else result

    def fill(
        self, work: Path, result: ExportResult, name: str
    ) -> tuple[ExportResult, CheckFailed | None]:
        """Write and check everything in `work`, which will be called `name`; and what failed where
        that is published all the same."""
        request = self.request
        # A graph is made from a slim checkpoint, which is checked like any and then thrown away.
        slim = work / "slim" if request.onnx or request.gguf else work
        slim.mkdir(exist_ok=True)
        written, compensation = self._write(work, slim, result)
        failure: CheckFailed | None = None
        if request.verify:
            with self.clock("verify"):
                report, failure = check_export(
                    self.session, result, self.text, work, request, compensation
                )
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not request.keep_failed:
                raise failure
            result = replace(result, report=report)
        card = export_card(name, self.session, result, result.report)
        (work / "README.md").write_text(card, encoding="utf-8")
        if slim == work:
            write_manifest(work, written.records)
            return result, failure
        shutil.copyfile(slim / "plan.json", work / "plan.json")
        if (slim / "LICENSE").exists():
            shutil.copyfile(slim / "LICENSE", work / "LICENSE")
        shutil.rmtree(slim)
        files = [*work.glob("model.onnx*"), *work.glob(GGUF_NAME)]
        write_manifest(work)
        size = sum(path.stat().st_size for path in files)
        return replace(result, graph_bytes=size), failure

    def _write(
        self, work: Path, slim: Path, result: ExportResult
    ) -> tuple[WrittenWeights, Compensator]:
        """The slim checkpoint in `slim`, and what is made of it in `work`."""
        session, clock = self.session, self.clock
        with clock("compensate"):
            compensation = plan_compensation(
                session, self.artifacts, result.plan, self.text, self.plan_request
            )
        with clock("slice"):
            written = write_slim(session, result.plan, compensation, slim)
        if self.request.onnx:
            with clock("graph"):
                write_graph(slim, work, self.request.onnx)
        if result.gguf:
            with clock("gguf"):
                write_gguf_files(slim, work, result.gguf)
        return written, compensation


def _check_requests(
    request: ExportRequest,
    plan_request: PlanRequest,
    scenario: str | os.PathLike[str] | None,
    plan: str | os.PathLike[str] | Plan | None,
) -> None:
    """UsageError for what cannot be asked together."""
    plan_request.check()
    if scenario is None and plan is None:
        raise UsageError("export needs --scenario FILE or --plan FILE.")
    if plan is not None and plan_request != PlanRequest():
        raise UsageError("--plan FILE decides by itself; leave out the options of 'spp plan'.")
    if request.max_perplexity_ratio is not None and (request.dry_run or not request.verify):
        raise UsageError("--max-perplexity needs the checks; leave out --dry-run and --no-verify.")
    if request.push_to_hub is not None:
        _check_push(request, request.push_to_hub)
    if plan is None:
        _check_layout(plan_request.layout, request.pad, request)


def _check_format(request: ExportRequest, device: str) -> None:
    """UsageError where the format cannot be, or what it takes is not installed."""
    if request.onnx:
        require_all()
        # What nothing here can run can still be written, where nobody asks for the checks.
        request.onnx.check(device if request.verify and not request.dry_run else None)
    if request.gguf:
        require_gguf()
        request.gguf.check()


def _check_push(request: ExportRequest, repo_id: str) -> None:
    """UsageError where pushing cannot succeed, before any work is done."""
    if request.dry_run or not request.verify:
        raise UsageError(
            "--push-to-hub takes what was written and checked. Drop --dry-run and --no-verify, or "
            "push what was not checked with 'spp push --unverified'."
        )
    check_hub(repo_id)


def _push(target: Path, request: ExportRequest, repo_id: str) -> PushResult:
    try:
        return push_to_hub(target, repo_id, private=request.private)
    except OutputError as error:
        raise OutputError(f"{error} The export is in {target}: push it with 'spp push'.") from error


def default_output(scenario: Scenario | None) -> Path:
    """`out/<name>` for a scenario file `<name>.txt`."""
    if scenario is None:
        raise UsageError("-o is missing: say where the export goes.")
    return Path("out") / Path(scenario.name).stem


def _check_layout(layout: str, pad: bool, request: ExportRequest) -> None:
    """UsageError for zeros that have nowhere to go, or a graph whose groups would differ."""
    if pad and layout != "ragged":
        raise UsageError(f"--pad fills the groups of ragged layers; this layout is {layout}.")
    if request.onnx and request.gguf:
        raise UsageError("onnx and gguf: one export has one format. Ask for one of them.")
    if (request.onnx or request.gguf) and layout == "ragged" and not pad:
        raise UsageError(
            f"--format {request.format} needs groups of the same size in a layer. Add --pad to "
            "fill those of a ragged layout with zeros."
        )


def _padded(decided: PlanResult, session: Session) -> PlanResult:
    """The same heads, to be written with zeros beside them."""
    source, compiled = session.source, replace(decided.plan, padded=True)
    layers = compiled.written_shapes(source.shape)
    sizes = predicted(source.shape, layers, written_shape(source, compiled))
    return replace(decided, plan=replace(compiled, predicted=sizes.to_dict()), predicted=sizes)


def _preflight(
    session: Session, target: Path, request: ExportRequest, asked: PlanRequest | None
) -> None:
    """Refuse what cannot succeed before any work is done for it. `asked` None: a plan is given,
    and says itself how large the result is."""
    check_readable(session.source.path, COMPANIONS)
    shape, least = session.source.shape, 0
    if asked is not None:
        limited = (asked.max_params, asked.max_kv_bytes, asked.strength, asked.max_latency)
        keep = asked.keep or (DEFAULT_KEEP if limited == (None,) * 4 else None)
        least = least_slim_bytes(shape, keep, asked.units)
    if request.dry_run:
        request = replace(request, verify=False)
    needs = _needs(session, target, least, request, runs_model=asked is not None)
    if not request.dry_run:
        check_disk(needs)
    check_memory(needs)


def _needs(
    session: Session, target: Path, slim_bytes: int, request: ExportRequest, *, runs_model: bool
) -> Needs:
    return export_needs(
        session,
        target,
        slim_bytes,
        runs_model=runs_model,
        verify=request.verify,
        onnx=request.onnx,
        gguf=request.gguf,
    )


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
