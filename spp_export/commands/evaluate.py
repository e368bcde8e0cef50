"""`evaluate`: how well choices made for a scenario do on text that did not influence them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.calibration.answers import Answering
from spp_export.commands.requests import (
    EvalTexts,
    EvaluateRequest,
    EvaluateScenariosRequest,
)
from spp_export.common.disk import publish_file
from spp_export.common.errors import OutputError, UsageError
from spp_export.common.options import WINDOW, command, non_default
from spp_export.common.versions import device_type, library_versions, machine
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.evaluation.bootstrap import RESAMPLES
from spp_export.evaluation.harness.curves import write_curves
from spp_export.evaluation.harness.inputs import Inputs, read_inputs
from spp_export.evaluation.harness.records import (
    RESULTS,
    SCHEMA_VERSION,
    RecordFile,
    Results,
    open_records,
    read_results,
)
from spp_export.evaluation.harness.rows import Row, row_key, standard_rows
from spp_export.evaluation.harness.table import comparisons, markdown, notes, ranking
from spp_export.evaluation.remarks import FEW_TOKENS
from spp_export.formats.gguf.encode import rounded
from spp_export.formats.gguf.options import Kind
from spp_export.models.session import Session, open_session
from spp_export.planning.planner import scenario_record
from spp_export.planning.scoring import default_criterion

if TYPE_CHECKING:
    from spp_export.evaluation.harness.planner import RowOpener

TABLE, CURVES = "table.md", "curves.png"
# How each yardstick that is rounded stores weights.
_BLOCKS: Mapping[str, Kind] = {"int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation wrote to `directory`, and all that its results file now holds."""

    directory: Path
    results: Results

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: figures without the lists per document, which the file has."""
        return {
            "output": str(self.directory),
            "texts": list(self.results.texts),
            "tokens": self.results.tokens,
            "notes": list(notes(self.results)),
            "uncertain": [
                name for name, count in self.results.tokens.items() if count < FEW_TOKENS
            ],
            "rows": [
                {
                    "rank": ranked.rank,
                    "label": ranked.row.label,
                    **ranked.row.to_dict(),
                    "kept": ranked.kept,
                    "perplexity": dict(ranked.perplexity),
                    "ratio": {name: interval.to_list() for name, interval in ranked.ratio.items()},
                    "kl": ranked.kl.to_list(),
                    "top1": ranked.top1.to_list(),
                    "greedy": ranked.greedy and ranked.greedy.to_list(),
                    "answers": {
                        name: {figure: value.to_list() for figure, value in figures.items()}
                        for name, figures in ranked.answers.items()
                    },
                }
                for rows in ranking(self.results).values()
                for ranked in rows
            ],
            "comparisons": [
                {
                    "keep": pair.ours.keep,
                    "units": pair.ours.units,
                    "compensation": pair.ours.compensation,
                    "first": pair.ours.label,
                    "second": pair.theirs.label,
                    "text": pair.text,
                    "ratio": pair.ratio.to_list(),
                    "kl": pair.kl.to_list(),
                    "verdict": pair.verdict,
                }
                for pair in comparisons(self.results)
            ],
            "failed": [
                {**record.row.to_dict(), "error": record.error} for record in self.results.failed
            ],
        }


@command(EvaluateRequest)
def evaluate(request: EvaluateRequest) -> EvalResult:
    """Measure rows on a scenario's held-out prompts, on `pools` and on `eval_set`, and write
    results.jsonl, table.md and curves.png to the directory `output`.

    Beside them stand controls and yardsticks: the dense model in bf16, int8 and int4, the last two
    not where its weights were quantised before. With answers, rows are also compared with the
    dense model's greedy answers to the held-out prompts.

    An output that holds results of the same evaluation is continued. Raises UsageError where a
    text to judge on is one that was calibrated on, and OutputError where `output` holds something
    else; `force` replaces an evaluation.

        result = spp_export.eval("chemistry.txt", "results", wrong="history.txt", keep=[0.8, 0.6])
    """
    from spp_export.evaluation.harness.planner import Planner, RowOpener, read_plans
    from spp_export.evaluation.harness.yardsticks import yardsticks

    directory = Path(request.output)
    _prepare(directory, request.force)
    inputs = read_inputs(
        request.scenario,
        request.wrong,
        request.eval_set,
        request.pools,
        request.domain,
        answers=request.answers,
    )
    if request.generate:
        inputs.check_answers()
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        matmul=request.matmul,
        dequantize=request.dequantize,
        parallel=request.parallel,
    )
    for units in request.units:
        session.source.family.check_units(units, session.source.shape)
    artifacts = open_artifacts(request.artifacts, request.model, session.source)
    others = {
        name: open_artifacts(path, request.model, session.source)
        for name, path in (request.other_artifacts or {}).items()
    }
    inputs.check_unseen([artifacts, *others.values()])
    inputs = inputs.within(session, request.calibration_tokens, _answering(request))
    plans = read_plans(session, request.plan)
    amount = request.calibration_tokens, _answering(request)
    removed = 1 - min(request.keep)
    default = default_criterion(
        session, artifacts, request.compensate[0], amount[1].tokens, removed
    )
    rows = standard_rows(
        request.keep,
        request.criterion_names(default),
        request.units,
        request.compensate,
        comparable=request.comparable,
        wrong=request.wrong is not None,
        ablations=request.ablations,
        other_artifacts=tuple(others),
        yardsticks=yardsticks(session),
    )
    planner = Planner(session, artifacts, inputs.scenario, inputs.wrong, others, *amount)
    prior = [text for _, text in artifacts.calibration]
    roundings = {name: partial(rounded, kind=kind) for name, kind in _BLOCKS.items()}
    opener = RowOpener(session, planner, plans, prior, roundings)
    context = _context(session, request, inputs, artifacts, others)
    with open_records(directory / RESULTS, _header(session, inputs, context)) as file:
        if _missing((*rows, *plans), file, context):
            _measure((*rows, *plans), opener, file, inputs, request, context)
    result = EvalResult(directory, read_results(directory / RESULTS))
    publish_file(directory / TABLE, markdown(result.results), force=True)
    if request.curves:
        write_curves(result.results, directory / CURVES)
    return result


eval = evaluate  # noqa: A001  the command's name


@command(EvaluateScenariosRequest)
def evaluate_scenarios(request: EvaluateScenariosRequest) -> tuple[EvalResult, ...]:
    """`evaluate` for several scenarios, each into the directory of its name below `output`.

    Without `wrong` each scenario's wrong one is the next in the list. Raises UsageError for two of
    one name.

        results = spp_export.evaluate_scenarios(["chemistry.txt", "history.txt"], "results")
    """
    names = [Path(scenario).stem for scenario in request.scenario]
    if len(set(names)) < len(names):
        raise UsageError(
            f"--scenario: two files have one name, got {', '.join(names)}. Rename one: each "
            "scenario's results lie in the directory of its name."
        )
    options = non_default(request, EvalTexts)
    following = [*request.scenario[1:], *request.scenario[:1]]
    return tuple(
        evaluate(scenario, Path(request.output) / name, **{"wrong": other, **options})
        for scenario, name, other in zip(request.scenario, names, following, strict=True)
    )


def _measure(
    rows: Sequence[Row],
    opener: RowOpener,
    file: RecordFile,
    inputs: Inputs,
    request: EvalTexts,
    context: Mapping[str, Any],
) -> None:
    from spp_export.evaluation.harness.generation import question_set
    from spp_export.evaluation.harness.greedy import GreedyReference
    from spp_export.evaluation.harness.measure import DenseReference
    from spp_export.evaluation.harness.runner import Questions, run_rows

    session = opener.session
    reference = DenseReference(
        session.model, session.tokenizer, inputs.texts, session.source.shape.vocab_size
    )
    questions = None
    if request.generate:
        sets = tuple(question_set(session.tokenizer, texts) for texts in inputs.eval_sets)
        questions = Questions(sets, session.tokenizer, request.max_new_tokens)
    greedy = None
    if request.answer_tokens and not session.from_disk:
        greedy = GreedyReference(
            session.model, session.tokenizer, inputs.texts[0], request.answer_tokens
        )
    run_rows(
        rows,
        opener.open,
        reference,
        file,
        _hash(context),
        questions=questions,
        greedy=greedy if greedy and greedy.prompts else None,
        seed=request.seed,
    )


def _missing(rows: Sequence[Row], file: RecordFile, context: Mapping[str, Any]) -> bool:
    """Whether rows are left to measure: a finished evaluation loads no model to draw its curves."""
    shared = _hash(context)
    return any(row_key(row, shared) not in file.done for row in rows)


def _answering(request: EvalTexts) -> Answering:
    return Answering(request.answer_tokens, request.seed)


def _context(
    session: Session,
    request: EvalTexts,
    inputs: Inputs,
    artifacts: Artifacts,
    others: Mapping[str, Artifacts],
) -> dict[str, Any]:
    """What every row of a results file shares; each name reads after "with a different"."""
    context: dict[str, Any] = {
        "model": session.source.fingerprint,
        "artifacts": artifacts.sha256,
        "scenario": inputs.scenario.sha256,
        "wrong scenario": inputs.wrong and inputs.wrong.sha256,
        "set of texts": {text.name: text.sha256 for text in inputs.texts},
        "dtype": session.dtype,
        "precision of products": session.matmul,
        "device": device_type(session.device),
        "seed": request.seed,
        "number of calibration tokens": request.calibration_tokens,
        "number of answer tokens": request.answer_tokens,
    }
    if inputs.scenario.answers:
        context["file of answers"] = inputs.scenario.answers.sha256
    if others:
        context["set of other artifacts"] = {name: other.sha256 for name, other in others.items()}
    if request.generate:
        context["way of answering"] = {
            "sets": {texts.name: texts.sha256 for texts in inputs.eval_sets},
            "max_new_tokens": request.max_new_tokens,
        }
    return context


def _header(session: Session, inputs: Inputs, context: Mapping[str, Any]) -> dict[str, Any]:
    from spp_export.evaluation.harness.measure import default_batch_tokens
    from spp_export.evaluation.harness.yardsticks import quantised_bits

    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": session.source.name,
            "fingerprint": session.source.fingerprint,
            "quantised_bits": quantised_bits(session.source),
        },
        "scenario": scenario_record(inputs.scenario),
        "wrong": inputs.wrong and scenario_record(inputs.wrong),
        "texts": {
            text.name: {
                "documents": len(text.read),
                "sha256": text.sha256,
                "tokens": text.tokens,
            }
            for text in inputs.texts
        },
        "settings": {
            "dtype": session.dtype,
            "matmul": session.matmul,
            "window": WINDOW,
            "batch_tokens": default_batch_tokens(device_type(session.device)),
            "resamples": RESAMPLES,
            "seed": context["seed"],
        },
        "machine": machine(session.device),
        "versions": library_versions(),
        "context": dict(context),
    }


def _hash(context: Mapping[str, Any]) -> str:
    text = json.dumps(context, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(directory: Path, force: bool) -> None:
    """Make the directory; it may hold an evaluation, which `force` removes, and nothing else."""
    results = directory / RESULTS
    try:
        if directory.exists() and not results.exists() and any(directory.iterdir()):
            raise OutputError(
                f"{directory}: holds files but no {RESULTS}. Choose another directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        if force:
            for name in (RESULTS, TABLE, CURVES):
                (directory / name).unlink(missing_ok=True)
    except OSError as problem:
        raise OutputError(f"{directory}: cannot be written ({problem.strerror}).") from None
