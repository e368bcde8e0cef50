"""`export`: the main job. Diagnose, plan, slice, compensate, write, verify, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from spp_export.calibration.answers import scenario_traffic
from spp_export.calibration.reading import scenario_text
from spp_export.calibration.stored import noting
from spp_export.commands.export_checks import check_export
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
from spp_export.common.disk import scratch_folder
from spp_export.common.errors import (
    CheckFailed,
    OutputError,
    UsageError,
)
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
from spp_export.common.publish import check_target, publish
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT, Scenario, read_scenario
from spp_export.formats.format import CardFacts, ModelFiles
from spp_export.formats.promised import promised_checkpoint
from spp_export.formats.registry import FORMATS
from spp_export.formats.safetensors.write import COMPANIONS, write_slim
from spp_export.models.checkpoint.companions import PROCESSOR_FILES, copy_companions, terms
from spp_export.models.hub import DEMO, model_license
from spp_export.models.session import Session, open_session
from spp_export.planning import Plan, dense_plan, read_plan, sample_plan, validate_plan
from spp_export.planning.bound import Predicted, predicted
from spp_export.planning.planner import (
    Planning,
    PlanResult,
    artifacts_record,
    plan_scenario,
    plan_tensors,
    scenario_record,
)
from spp_export.planning.written import written_shape
from spp_export.slicing.compensation import (
    Compensator,
    calibration_tokens,
    plan_answering,
    plan_compensation,
    plan_matmul,
    warn_of_other_answers,
)
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
    text = None
    if request.scenario is not None:
        text = with_answers(read_scenario(request.scenario), request.answers)
    if request.max_perplexity is not None and not (text and text.split()[1]):
        raise UsageError(
            "--max-perplexity: needs held-out text, a scenario of at least "
            f"{MIN_PROMPTS_TO_HOLD_OUT} prompts. Give it more, or drop --max-perplexity."
        )
    target = Path(request.output) if request.output is not None else default_output(text)
    if not request.dry_run:
        check_target(target, request.force)
        check_place(target)
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        matmul=request.matmul,
        layerwise=request.layerwise,
        dequantize=request.dequantize,
        parallel=request.parallel,
    )
    request = request.fitted(session.source.shape)
    _check_format(request)
    artifacts = _artifacts(request, session)
    _check_files(session, request)
    _preflight(session, target, request)
    if text is not None and (request.plan is None or request.verify):
        # Refuses what is no text for this model, held out or not, before any work is done.
        scenario_text(session, text, request.calibration_tokens)
    job = _Job(session, artifacts, text, request, _Clock())
    with noting() as kept:
        result, files = job.decide(target)
        result = replace(result, kept=kept)
        if request.dry_run:
            return result
        assert result.needs
        check_disk(result.needs)
        with publish(target, request.force) as work:
            result, failure = job.fill(work, result, files, target.name)
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    result = replace(result, path=target)
    if request.push_to_hub is None:
        return result
    with job.clock("push"):
        return replace(result, pushed=_push(target, request, request.push_to_hub))


@dataclass(frozen=True)
class _Job:
    """One export: its inputs, its request, and the time of each stage."""

    session: Session
    artifacts: Artifacts | None
    text: Scenario | None
    request: ExportRequest
    clock: _Clock

    def decide(self, target: Path) -> tuple[ExportResult, ModelFiles]:
        """The plan, given or compiled, what it will come to, and the files to write."""
        session, request = self.session, self.request
        with self.clock("plan"):
            decided = _decide(session, self.artifacts, self.text, request)
            if request.plan is not None:
                request.check_layout(decided.plan.layout, request.pad or decided.plan.padded)
            if request.pad:
                decided = _padded(decided, session)
        promised = promised_checkpoint(session.source, decided.plan)
        files = FORMATS[request.format].prepare(request.form, promised, decided.plan)
        needs = _needs(
            session,
            target,
            decided.predicted.file_bytes,
            request,
            runs_model=request.plan is None or decided.plan.compensation != "none",
        )
        result = ExportResult(
            path=None,
            plan=decided.plan,
            shape=session.source.shape,
            diagnosis=decided.diagnosis,
            predicted=_sizes(decided, session, files.element_bytes),
            engines=files.engines,
            tensors=plan_tensors(session, decided.plan),
            seconds=self.clock.seconds,
            format=request.format,
            form=files.summary,
            needs=replace(needs, disk={**needs.disk, **files.nbytes}),
        )
        return result, files

    def fill(
        self, work: Path, result: ExportResult, files: ModelFiles, name: str
    ) -> tuple[ExportResult, CheckFailed | None]:
        """Write and check everything in `work`, to be published as `name`. Returns the failed
        checks where the export is published in spite of them.
        """
        request = self.request
        made = FORMATS[request.format]
        # Other formats are made from a slim checkpoint, which is checked like any and then thrown
        # away.
        slim = work / "slim" if made.converted else work
        slim.mkdir(exist_ok=True)
        written, compensation = self._write(slim, result, kept=not made.converted)
        if made.converted:
            with self.clock(made.name):
                files.write(slim, work)
        failure: CheckFailed | None = None
        if request.verify:
            with self.clock("verify"), scratch_folder(work.parent, "check-") as scratch:
                report, failure = check_export(
                    self.session,
                    result,
                    self.text,
                    (slim, work),
                    files,
                    request,
                    compensation,
                    scratch,
                )
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not request.keep_failed:
                raise failure
            result = replace(result, report=report)
        license_name = model_license(self.session.source.path)
        slim_facts = result.plan, result.shape, result.predicted
        card = files.card(CardFacts(name, result.report, license_name, slim_facts))
        (work / "README.md").write_text(card, encoding="utf-8")
        if not made.converted:
            write_manifest(work, written.records)
            return result, failure
        shutil.copyfile(slim / "plan.json", work / "plan.json")
        copy_companions(slim, terms(slim), work)
        shutil.rmtree(slim)
        write_manifest(work)
        size = sum(path.stat().st_size for path in work.glob(made.weights))
        return replace(result, nbytes=size), failure

    def _write(
        self, slim: Path, result: ExportResult, *, kept: bool
    ) -> tuple[WrittenWeights, Compensator]:
        """The slim checkpoint."""
        session, clock = self.session, self.clock
        with clock("compensate"):
            compensation = plan_compensation(
                session, self.artifacts, result.plan, self.text, self.request
            )
        with clock("slice"):
            written = write_slim(session, result.plan, compensation, slim, kept=kept)
        return written, compensation


def _check_format(request: ExportRequest) -> None:
    """UsageError for a format that the request does not allow or whose libraries are missing."""
    FORMATS[request.format].require()
    # What nothing here can run can still be written, where nobody asks for the checks.
    request.form.check(request.device if request.verify and not request.dry_run else None)


def _check_files(session: Session, request: ExportRequest) -> None:
    """Refuse what the format cannot hold before there is a plan, by one of its kind."""
    if request.plan is not None:
        return
    source = session.source
    dense = dense_plan(source.shape, source.fingerprint, source.name)
    layout = "uniform" if request.keep == 1 else request.layout  # then no layer loses anything
    sample = sample_plan(dense, source.shape, layout, request.compensate, request.units)
    FORMATS[request.format].prepare(request.form, promised_checkpoint(source, sample), sample)


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


def _sizes(decided: PlanResult, session: Session, element_bytes: int) -> Predicted:
    """What the plan comes to where a weight takes so many bytes."""
    source, compiled = session.source, decided.plan
    if element_bytes == source.shape.element_bytes:
        return decided.predicted
    dense = replace(source.shape, element_bytes=element_bytes)
    written = replace(written_shape(source, compiled), element_bytes=element_bytes)
    return predicted(dense, compiled.written_shapes(source.shape), written)


def _preflight(session: Session, target: Path, request: ExportRequest) -> None:
    """Refuse what cannot succeed before any work is done for it; a plan says itself how large the
    result is."""
    place = session.source.path
    check_readable(place, (*COMPANIONS, *PROCESSOR_FILES, *terms(place)))
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
        form=request.form,
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
        if not request.seeks_smallest:
            return plan_scenario(session, artifacts, scenario, request)
        from spp_export.evaluation.search import PlanSearch

        planning = Planning.begin(session, artifacts, scenario, request)
        return PlanSearch(planning).smallest(request.wanted).result
    decided = plan if isinstance(plan, Plan) else read_plan(plan)
    source = session.source
    validate_plan(decided, source.shape, source.fingerprint)
    warn_of_other_answers(decided, scenario)
    if decided.compensation != "none":
        if session.dtype == "float32":
            session.matmul = plan_matmul(decided)
        # These decide the re-fit, whatever the plan was made for.
        if scenario is not None:
            limit = calibration_tokens(decided, request)
            answering = plan_answering(decided, request)
            text = scenario_traffic(session, scenario, limit, answering)
            decided = replace(decided, scenario=scenario_record(scenario, text))
        if artifacts is not None:
            decided = replace(decided, artifacts=artifacts_record(artifacts))
    layers = decided.written_shapes(source.shape)
    sizes = predicted(source.shape, layers, written_shape(source, decided))
    return PlanResult(decided, source.shape, None, sizes)


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
