"""`evaluate`: what scenario-specific choices are worth on text that had no say in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.disk import publish_file
from spp_export.common.errors import OutputError, UsageError
from spp_export.common.versions import device_type, library_versions, machine
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.evaluation.harness import BASELINES, DYNAMIC, Row, row_key, standard_rows
from spp_export.evaluation.harness.answers import DEFAULT_NEW_TOKENS
from spp_export.evaluation.harness.bootstrap import RESAMPLES
from spp_export.evaluation.harness.curves import write_curves
from spp_export.evaluation.harness.inputs import Inputs, read_inputs
from spp_export.evaluation.harness.planner import Planner
from spp_export.evaluation.harness.records import (
    RESULTS,
    SCHEMA_VERSION,
    RecordFile,
    Results,
    open_records,
    read_results,
)
from spp_export.evaluation.harness.table import comparisons, markdown, ranking
from spp_export.importance import COMPARABLE
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.models.shape import UNITS, Units
from spp_export.planning import COMPENSATIONS, Compensation
from spp_export.planning.budget import Budget
from spp_export.planning.planner import scenario_record
from spp_export.planning.scoring import CRITERION_NAMES, DEFAULT_CRITERION

if TYPE_CHECKING:
    from spp_export.evaluation.harness.opener import RowOpener

DEFAULT_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
EVERY_CRITERION = "all"
TABLE, CURVES = "table.md", "curves.png"


@dataclass(frozen=True)
class EvalRequest:
    """Which rows to measure, and how. The controls are always among them.

    criteria: names, or "all"; none for the default of the first compensation. The first is the one
    that controls and ablations vary. domains: of the pools; none for all. generate: also answer
    the evaluation sets. seed: of the bootstrap.
    """

    keeps: tuple[float, ...] = DEFAULT_KEEPS
    criteria: tuple[str, ...] = ()
    units: tuple[Units, ...] = ("heads",)
    compensations: tuple[Compensation, ...] = ("lstsq",)
    comparable: str | None = None
    ablations: bool = False
    domains: tuple[str, ...] = ()
    generate: bool = False
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    curves: bool = True
    seed: int = 0

    def check(self) -> None:
        """UsageError for a word that names nothing, or a budget that is none."""
        for keep in self.keeps:
            Budget(keep=keep)
        for name in self.criteria:
            if name in DYNAMIC and name not in BASELINES:
                raise UsageError(
                    f"--criterion {name}: a baseline of the repository's benchmarks, which are not "
                    "importable here. Run it in a clone, with benchmarks on PYTHONPATH."
                )
        for option, values, known in (
            ("--criterion", self.criteria, (*CRITERION_NAMES, *BASELINES, EVERY_CRITERION)),
            ("--units", self.units, UNITS),
            ("--compensate", self.compensations, COMPENSATIONS),
            ("--comparable", (self.comparable or "raw",), COMPARABLE),
        ):
            for value in values:
                if value not in known:
                    raise UsageError(f"{option} {value}: expected one of {', '.join(known)}.")
        if not (self.units and self.compensations):
            raise UsageError("an evaluation needs at least one of --units and of --compensate.")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more.")

    @property
    def criterion_names(self) -> tuple[str, ...]:
        """The criteria asked for, each once; the default first where all are."""
        default = DEFAULT_CRITERION[self.compensations[0]]
        asked = self.criteria or (default,)
        if EVERY_CRITERION in asked:
            named = (name for name in asked if name != EVERY_CRITERION)
            asked = (*named, default, *CRITERION_NAMES, *BASELINES)
        return tuple(dict.fromkeys(asked))


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
            "rows": [
                {
                    "rank": ranked.rank,
                    "label": ranked.row.label,
                    **ranked.row.to_dict(),
                    "kept": ranked.kept,
                    "perplexity": dict(ranked.perplexity),
                    "ratio": {name: found.to_list() for name, found in ranked.ratio.items()},
                    "kl": ranked.kl.to_list(),
                    "top1": ranked.top1.to_list(),
                    "answers": {
                        name: {figure: found.to_list() for figure, found in figures.items()}
                        for name, figures in ranked.answers.items()
                    },
                }
                for rows in ranking(self.results).values()
                for ranked in rows
            ],
            "comparisons": [
                {
                    "keep": each.ours.keep,
                    "units": each.ours.units,
                    "compensation": each.ours.compensation,
                    "first": each.ours.label,
                    "second": each.theirs.label,
                    "text": each.text,
                    "ratio": each.ratio.to_list(),
                    "verdict": each.verdict,
                }
                for each in comparisons(self.results)
            ],
            "failed": [
                {**record.row.to_dict(), "error": record.error} for record in self.results.failed
            ],
        }


def evaluate(
    scenario: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    wrong: str | os.PathLike[str] | None = None,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    other_artifacts: Mapping[str, str | os.PathLike[str]] | None = None,
    request: EvalRequest | None = None,
    pools: str | os.PathLike[str] | None = None,
    eval_sets: Sequence[str | os.PathLike[str]] = (),
    plans: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> EvalResult:
    """Measure rows on a scenario's held-out prompts, on `pools` and on `eval_sets`, and write
    results.jsonl, table.md and curves.png to the directory `output`.

    An output that holds results of the same evaluation is continued. Raises UsageError where a
    text to judge on is one that was calibrated on, and OutputError where `output` holds something
    else; `force` replaces an evaluation.
    """
    from spp_export.evaluation.harness.opener import RowOpener, given_plans

    request = request or EvalRequest()
    request.check()
    directory = Path(output)
    _prepare(directory, force)
    inputs = read_inputs(scenario, wrong, eval_sets, pools, request.domains)
    if request.generate:
        inputs.check_answers()
    session = open_session(model, device=device, dtype=dtype)
    found = open_artifacts(artifacts, model, session.source)
    others = {
        name: open_artifacts(path, model, session.source)
        for name, path in (other_artifacts or {}).items()
    }
    inputs.check_unseen([found, *others.values()])
    given = given_plans(session, plans)
    rows = standard_rows(
        request.keeps,
        request.criterion_names,
        request.units,
        request.compensations,
        comparable=request.comparable,
        wrong=wrong is not None,
        ablations=request.ablations,
        other_artifacts=tuple(others),
    )
    planner = Planner(session, found, inputs.scenario, inputs.wrong, others)
    opener = RowOpener(session, planner, given, [text for _, text in found.calibration])
    context = _context(session, request, inputs, found, others)
    with open_records(directory / RESULTS, _header(session, inputs, context)) as file:
        if _missing((*rows, *given), file, context):
            _measure((*rows, *given), opener, file, inputs, request, context)
    result = EvalResult(directory, read_results(directory / RESULTS))
    publish_file(directory / TABLE, markdown(result.results), force=True)
    if request.curves:
        write_curves(result.results, directory / CURVES)
    return result


def evaluate_scenarios(
    scenarios: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    wrong: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[EvalResult, ...]:
    """`evaluate` for several scenarios, each into the directory of its name below `output`.

    Without `wrong` each scenario's wrong one is the next in the list. Raises UsageError for two of
    one name.
    """
    names = [Path(scenario).stem for scenario in scenarios]
    if len(set(names)) < len(names):
        raise UsageError(
            f"--scenario: two files have one name, got {', '.join(names)}. Rename one: each "
            "scenario's results lie in the directory of its name."
        )
    following = [*scenarios[1:], *scenarios[:1]]
    return tuple(
        evaluate(scenario, Path(output) / name, wrong=other if wrong is None else wrong, **options)
        for scenario, name, other in zip(scenarios, names, following, strict=True)
    )


def _measure(
    rows: Sequence[Row],
    opener: RowOpener,
    file: RecordFile,
    inputs: Inputs,
    request: EvalRequest,
    context: Mapping[str, Any],
) -> None:
    from spp_export.evaluation.harness.generation import question_set
    from spp_export.evaluation.harness.measure import DenseReference
    from spp_export.evaluation.harness.runner import Questions, run_rows

    session = opener.session
    reference = DenseReference(
        session.model, session.tokenizer, inputs.texts, session.source.shape.vocab_size
    )
    questions = None
    if request.generate:
        sets = tuple(question_set(session.tokenizer, each) for each in inputs.eval_sets)
        questions = Questions(sets, session.tokenizer, request.max_new_tokens)
    run_rows(
        rows,
        opener.open,
        reference,
        file,
        _hash(context),
        questions=questions,
        seed=request.seed,
    )


def _missing(rows: Sequence[Row], file: RecordFile, context: Mapping[str, Any]) -> bool:
    """Whether there is work at all: a finished evaluation loads no model to be drawn again."""
    shared = _hash(context)
    return any(row_key(row, shared) not in file.done for row in rows)


def _context(
    session: Session,
    request: EvalRequest,
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
        "device": device_type(session.device),
        "seed": request.seed,
    }
    if others:
        context["set of other artifacts"] = {name: each.sha256 for name, each in others.items()}
    if request.generate:
        context["way of answering"] = {
            "sets": {each.name: each.sha256 for each in inputs.eval_sets},
            "max_new_tokens": request.max_new_tokens,
        }
    return context


def _header(session: Session, inputs: Inputs, context: Mapping[str, Any]) -> dict[str, Any]:
    from spp_export.calibration.activations import MAX_TOKENS
    from spp_export.evaluation.harness.measure import default_batch_tokens

    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": session.source.name, "fingerprint": session.source.fingerprint},
        "scenario": scenario_record(inputs.scenario),
        "wrong": inputs.wrong and scenario_record(inputs.wrong),
        "texts": {
            text.name: {"documents": len(text.documents), "sha256": text.sha256}
            for text in inputs.texts
        },
        "settings": {
            "dtype": session.dtype,
            "max_tokens": MAX_TOKENS,
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
