"""What the defaults of planning were chosen by: `python -m spp_campaigns.choices`.

Plans a scenario in other ways than the default one, and measures the mean KL to the dense model on
its answers to held-out prompts of the scenario, and to those of another scenario: by `obs` and by
`fisher` at several sizes, with other shares of the scenario's own text and of the domains that were
diagnosed, with widths of MLPs in other multiples, and with heads in other layouts.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spp_campaigns.command import finish, machine, parser, table
from spp_export.calibration.activations import TokenBatch, token_batches
from spp_export.calibration.answers import Answering, scenario_traffic
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS, MatmulName
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.evaluation.bootstrap import DocumentScores, agreement, mean_kl
from spp_export.evaluation.oracle import masked_dense
from spp_export.evaluation.quality import (
    add_scores,
    documents_of,
    next_token_log_probabilities,
)
from spp_export.models.session import Session, open_session
from spp_export.models.shape import Layout, Units
from spp_export.planning.budget import Budget
from spp_export.planning.planner import Planning
from spp_export.planning.request import PlanRequest
from spp_export.slicing.compensation import plan_compensation

_SIZES = (0.9, 0.8, 0.7, 0.6, 0.5)
# Shrinkage towards all domains alike, and the weight of the scenario's own text.
_MIXTURES = ((1.0, 0.0), (0.5, 0.15), (0.5, 0.35), (0.5, 0.6), (0.0, 0.3), (0.0, 0.6), (0.0, 1.0))
UNITS: tuple[Units, ...] = ("heads", "both")
_WIDTHS = (1, 16, 32, 128)
_LAYOUTS: tuple[Layout, ...] = ("uniform", "ragged")
_VARIED = ("size", "text", "layout", "width")
_BATCH_TOKENS = 512
_COLUMNS = {
    "scenario": "{scenario}",
    "units": "{units}",
    "kept": "{keep:.0%}",
    "criterion": "{criterion}",
    "shrinkage": "{shrinkage:.2f}",
    "own text": "{own_text:.2f}",
    "width": "{width_multiple}",
    "layout": "{layout}",
    "KL": "{own[kl]:.3f} [{own[low]:.3f}, {own[high]:.3f}]",
    "same token": "{own[same_token]:.1%}",
    "KL of another scenario": "{other[kl]:.3f}",
}


@dataclass
class Answers:
    """The dense model's answers to held-out prompts, and its log-probabilities of each batch."""

    texts: int
    batches: Sequence[TokenBatch]
    dense: Sequence[Any]

    @classmethod
    def of(cls, session: Session, scenario: Scenario) -> Answers:
        """Made, or taken from the cache."""
        traffic = scenario_traffic(session, scenario, DEFAULT_CALIBRATION_TOKENS, Answering())
        texts = traffic.held_out.texts
        batches = token_batches(session.tokenizer, texts, batch_tokens=_BATCH_TOKENS)
        with torch.no_grad():
            dense = [next_token_log_probabilities(session.model, batch) for batch in batches]
        return cls(len(texts), batches, dense)

    def judged(self, slim: torch.nn.Module) -> dict[str, float]:
        """Mean KL with its interval, the share of the same first token, and how many tokens."""
        sums = torch.zeros((5, self.texts), dtype=torch.float64)
        with torch.no_grad():
            for batch, (log_dense, targets) in zip(self.batches, self.dense, strict=True):
                log_slim, _ = next_token_log_probabilities(slim, batch)
                add_scores(sums, log_dense, log_slim, targets, documents_of(batch))
        scores = DocumentScores(*(row.numpy() for row in sums))
        kl = mean_kl(scores)
        figures = {"kl": kl.value, "low": kl.low, "high": kl.high}
        figures |= {"same_token": agreement(scores).value, "tokens": int(scores.tokens.sum())}
        return {name: round(value, 4) for name, value in figures.items()}


def two_scenarios(description: str | None, *, writes: bool = False) -> argparse.ArgumentParser:
    """A parser of a campaign that plans for one scenario, and measures on another one as well."""
    made = parser(description, writes=writes)
    made.add_argument("--model", default="demo", help="directory or demo")
    made.add_argument("--artifacts", help="artifacts of the model; not needed for demo")
    made.add_argument("--scenario", required=True, help="scenario file")
    made.add_argument("--other", required=True, help="another scenario, which is only measured on")
    return made


def opened(
    options: argparse.Namespace, matmul: MatmulName = "float32"
) -> tuple[Session, Artifacts, Scenario, dict[str, Answers]]:
    """What the arguments of `two_scenarios` name: the model, its artifacts, the scenario, and
    answers to the held-out prompts of both."""
    session = open_session(options.model, matmul=matmul)
    artifacts = open_artifacts(options.artifacts, options.model, session.source)
    scenario, other = read_scenario(options.scenario), read_scenario(options.other)
    answers = {"own": Answers.of(session, scenario), "other": Answers.of(session, other)}
    return session, artifacts, scenario, answers


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every way of planning."""
    made = two_scenarios(__doc__)
    made.add_argument("--size", type=float, action="append", help="share kept; repeatable")
    made.add_argument("--vary", choices=_VARIED, action="append", help="what; repeatable")
    options = made.parse_args(arguments)
    session, artifacts, scenario, answers = opened(options)
    rows = []
    for request, sizes, mixture in _ways(options.size or _SIZES, options.vary or _VARIED):
        mixed = artifacts
        if mixture:
            shrinkage, own_text = mixture
            chosen = {"shrinkage": {"chosen": shrinkage}, "scenario_weight": {"chosen": own_text}}
            mixed = replace(artifacts, manifest={**artifacts.manifest, **chosen})
        planning = Planning.begin(session, mixed, scenario, request)
        for keep in sizes:
            row = {"scenario": Path(options.scenario).stem, **_row(planning, keep, answers)}
            rows.append(row)
            print(table(_COLUMNS, [row]).splitlines()[-1], flush=True)
    document = {"machine": machine(), "model": options.model, "rows": rows}
    finish(options, document, "", table(_COLUMNS, rows))


def _ways(
    sizes: Sequence[float], varied: Collection[str]
) -> Iterator[tuple[PlanRequest, Sequence[float], tuple[float, float] | None]]:
    """Requests, the shares to keep, and a shrinkage and a weight of the scenario's own text where
    they are not those of the artifacts."""
    for units in UNITS:
        default = PlanRequest(units=units, criterion="fisher")
        if "size" in varied:
            yield replace(default, criterion="obs"), sizes, None
            yield default, sizes, None
        for mixture in _MIXTURES if "text" in varied else ():
            yield default, (0.8,), mixture
        for layout in _LAYOUTS if "layout" in varied else ():
            yield replace(default, layout=layout), (0.8,), None
        for width in _WIDTHS if "width" in varied and units == "both" else ():
            yield replace(default, width_multiple=width), (0.8,), None


def _row(planning: Planning, keep: float, answers: Mapping[str, Answers]) -> dict[str, Any]:
    session, artifacts, request = planning.session, planning.artifacts, planning.request
    plan = planning.within(Budget(keep=keep, units=request.units)).plan
    compensation = plan_compensation(session, artifacts, plan, planning.scenario, request)
    source = session.source
    projections = compensation.projections()
    with masked_dense(session.model, source.family, source.shape, plan, projections) as slim:
        judged = {name: of.judged(slim) for name, of in answers.items()}
    return {
        "units": request.units,
        "keep": keep,
        "criterion": request.criterion,
        "shrinkage": artifacts.shrinkage,
        "own_text": artifacts.scenario_weight,
        "width_multiple": request.width_multiple,
        "layout": request.layout,
        **judged,
    }


if __name__ == "__main__":
    main()
