"""`export`: the main job. Diagnose, plan, slice, compensate, write, verify, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from spp_export.commands.export_checks import as_gguf, as_onnx, check_export, export_card
from spp_export.commands.export_request import ExportResult
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
from spp_export.commands.requests import ExportRequest
from spp_export.common.errors import (
    CheckFailed,
    OutputError,
    UsageError,
)
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
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
from spp_export.planning.planner import (
    PlanResult,
    artifacts_record,
    plan_scenario,
    plan_tensors,
    scenario_record,
)
from spp_export.planning.written import written_shape
from spp_export.slicing.compensation import Compensator, plan_compensation
from spp_export.slicing.weights import WrittenWeights


@command(ExportRequest)
def export(request: ExportRequest) -> ExportResult:
    """Write the slim checkpoint of a scenario, or of a given plan, checked and published whole.

    Raises ParityError or QualityError when a check does not hold: then nothing is published unless
    `keep_failed`.

        spp_export.export("chemistry.txt", keep=0.8, output="out/chemistry")
    """
    if request.push_to_hub is not None:
        check_hub(request.push_to_hub)
    _check_format(request)
    text = None if request.scenario is None else read_scenario(request.scenario)
    target = Path(request.output) if request.output is not None else default_output(text)
    if not request.dry_run:
        check_target(target, request.force)
        check_place(target)
    session = open_session(
        request.model, device=request.device, dtype=request.dtype, layerwise=request.layerwise
    )
    artifacts = _artifacts(request, session)
    _preflight(session, target, request)
    job = _Job(session, artifacts, text, request, _Clock())
    result = job.decide(target)
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
    request: ExportRequest
    clock: _Clock

    def decide(self, target: Path) -> ExportResult:
        """The plan, given or compiled, and what it will come to."""
        session, request = self.session, self.request
        with self.clock("plan"):
            decided = _decide(session, self.artifacts, self.text, request)
            if request.plan is not None:
                request.check_layout(decided.plan.layout, request.pad or decided.plan.padded)
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
                runs_model=request.plan is None or decided.plan.compensation != "none",
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
                session, self.artifacts, result.plan, self.text, self.request
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


def _check_format(request: ExportRequest) -> None:
    """UsageError where the format cannot be, or what it takes is not installed."""
    if request.onnx:
        require_all()
        # What nothing here can run can still be written, where nobody asks for the checks.
        request.onnx.check(request.device if request.verify and not request.dry_run else None)
    if request.gguf:
        require_gguf()
        request.gguf.check()


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


def _padded(decided: PlanResult, session: Session) -> PlanResult:
    """The same heads, to be written with zeros beside them."""
    source, compiled = session.source, replace(decided.plan, padded=True)
    layers = compiled.written_shapes(source.shape)
    sizes = predicted(source.shape, layers, written_shape(source, compiled))
    return replace(decided, plan=replace(compiled, predicted=sizes.to_dict()), predicted=sizes)


def _preflight(session: Session, target: Path, request: ExportRequest) -> None:
    """Refuse what cannot succeed before any work is done for it; a plan says itself how large the
    result is."""
    check_readable(session.source.path, COMPANIONS)
    shape, least = session.source.shape, 0
    if request.plan is None:
        least = least_slim_bytes(shape, request.budget.keep, request.units)
    if request.dry_run:
        request = replace(request, verify=False)
    needs = _needs(session, target, least, request, runs_model=request.plan is None)
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


def _artifacts(request: ExportRequest, session: Session) -> Artifacts | None:
    """The artifacts; None where a plan is given and there are none."""
    if request.artifacts is None and request.model != DEMO and request.plan is not None:
        return None
    return open_artifacts(request.artifacts, request.model, session.source)


def _decide(
    session: Session,
    artifacts: Artifacts | None,
    scenario: Scenario | None,
    request: ExportRequest,
) -> PlanResult:
    """The plan given, or the one compiled from the scenario."""
    plan = request.plan
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
