"""Perplexity of slim models against the dense one, with controls: `python -m spp_bench.quality`.

Every row is the masked dense model with the row's heads and, where compensated, its re-fitted
output projections: the function that an export is checked to compute. Two texts, neither used to
choose or fit anything: the scenario's held-out prompts and its domain's validation pool.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spp_bench.machine import machine
from spp_export.activations import TokenBatch, token_batches
from spp_export.artifacts import Artifacts
from spp_export.budget import Budget
from spp_export.checkpoint.reader import read_float
from spp_export.diagnosis import Diagnosis
from spp_export.families import Role
from spp_export.moments import Moments
from spp_export.pipeline.calibration import scenario_moments
from spp_export.pipeline.compensation import Compensation
from spp_export.pipeline.diagnose import diagnose_prompts
from spp_export.pipeline.plan import PlanRequest, plan_scenario, removal_options
from spp_export.plans import (
    LayerPlan,
    Plan,
    compile_options,
    compile_plan,
    dense_plan,
    forced_heads,
)
from spp_export.pools import read_pools
from spp_export.quality import next_token_log_probabilities
from spp_export.reference import OutputProjection, masked_dense
from spp_export.scenario import Scenario, read_scenario
from spp_export.session import Session, open_artifacts, open_session

_DATA = Path(__file__).resolve().parents[1] / "data"
_RANDOM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One way of choosing heads and compensating at one budget."""

    keep: float
    chosen_by: str
    compensation: str
    layers: tuple[LayerPlan, ...]
    moments: Moments | None


class Bench:
    """The model, its artifacts, the scenario and a wrong one, and the texts to be judged on."""

    def __init__(self, scenario: Path, wrong: Path, pool: Path) -> None:
        self.session: Session = open_session()
        self.artifacts: Artifacts = open_artifacts(None, "demo", self.session.source)
        self.scenario = read_scenario(scenario)
        self.wrong = read_scenario(wrong)
        tokenizer = self.session.tokenizer
        held_out = read_pools(pool.parent, [pool.name]).val[0]
        self.texts: dict[str, list[TokenBatch]] = {
            "scenario, held out": token_batches(
                tokenizer, self.scenario.split()[1], batch_tokens=512
            ),
            f"{pool.name} pool, validation": token_batches(tokenizer, held_out, batch_tokens=512),
        }

    def moments_of(self, scenario: Scenario) -> Moments:
        """The moments an export for this scenario uses."""
        prompts, _ = scenario.split()
        diagnosis: Diagnosis = diagnose_prompts(self.session, self.artifacts, prompts)
        return scenario_moments(self.session, self.artifacts, diagnosis.shares, prompts)

    def rows(self, keep: float) -> Iterator[Row]:
        """Every row of one budget: the default, what it is made of, and controls."""
        request = PlanRequest(keep=keep)
        own = self.moments_of(self.scenario)
        everywhere = scenario_moments(self.session, self.artifacts, None, ())
        wrong = self.moments_of(self.wrong)
        yield Row(keep, "obs, the scenario", "lstsq", self._obs(own, keep), own)
        yield Row(keep, "obs, domain mean", "lstsq", self._obs(everywhere, keep), everywhere)
        yield Row(keep, "obs, wrong scenario", "lstsq", self._obs(wrong, keep), wrong)
        for criterion in ("energy", "axis"):
            layers = plan_scenario(
                self.session,
                self.artifacts,
                self.scenario,
                replace(request, criterion=criterion),
            ).plan.layers
            for compensation in ("lstsq", "none"):
                yield Row(keep, criterion, compensation, layers, own)
        for seed in _RANDOM_SEEDS:
            layers = self._random(keep, seed)
            for compensation in ("lstsq", "none"):
                yield Row(keep, f"random, seed {seed}", compensation, layers, own)

    def _obs(self, moments: Moments, keep: float) -> tuple[LayerPlan, ...]:
        shape = self.session.source.shape
        forced = forced_heads(self.artifacts.whitelist, shape)
        options = removal_options(self.session, moments, forced)
        return compile_options(options, shape, Budget(keep=keep))[0]

    def _random(self, keep: float, seed: int) -> tuple[LayerPlan, ...]:
        shape = self.session.source.shape
        scores = np.random.default_rng(seed).random((shape.num_layers, shape.query_heads))
        return compile_plan(scores, shape, Budget(keep=keep))[0]

    def perplexities(self, row: Row | None) -> dict[str, float]:
        """Perplexity on every text; of the dense model without a row."""
        source = self.session.source
        plan = dense_plan(source.shape, source.fingerprint, source.name)
        projections = {}
        if row is not None:
            plan = replace(plan, layers=row.layers, compensation=row.compensation)  # type: ignore[arg-type]
            projections = self._projections(plan, row.moments)
        with masked_dense(
            self.session.model, source.family, source.shape, plan, projections
        ) as model:
            return {name: perplexity(model, batches) for name, batches in self.texts.items()}

    def _projections(self, plan: Plan, moments: Moments | None) -> dict[int, OutputProjection]:
        source = self.session.source
        compensation = Compensation(source, plan, moments)
        found = {}
        for spec in source.family.tensors(source.shape, source.shape.layers):
            if spec.role is not Role.OUTPUT or spec.layer is None:
                continue
            refit = compensation.refit(spec)
            if refit is not None:
                weight = refit(read_float(source.tensors[spec.name]))
                found[spec.layer] = OutputProjection(torch.from_numpy(weight).float())
        return found


def perplexity(model: torch.nn.Module, batches: Sequence[TokenBatch]) -> float:
    """exp of the mean negative log-likelihood of the next tokens."""
    total, tokens = 0.0, 0
    for batch in batches:
        log_p, targets = next_token_log_probabilities(model, batch)
        total -= float(log_p.gather(1, targets[:, None]).double().sum())
        tokens += len(targets)
    return math.exp(total / tokens)


def run(bench: Bench, keeps: Sequence[float], echo: bool) -> list[dict[str, Any]]:
    """One record per row, dense first; printed as they come unless `echo` is off."""
    dense = bench.perplexities(None)
    names = list(dense)
    records: list[dict[str, Any]] = []

    def add(keep: float, chosen_by: str, compensation: str, found: dict[str, float]) -> None:
        ratios = {name: found[name] / dense[name] for name in names}
        records.append(
            {
                "keep": keep,
                "chosen_by": chosen_by,
                "compensation": compensation,
                "perplexity": {name: round(found[name], 3) for name in names},
                "ratio": {name: round(ratios[name], 4) for name in names},
            }
        )
        if echo:
            shown = "  ".join(f"{found[name]:9.2f} ({ratios[name]:6.3f}x)" for name in names)
            print(f"{keep:4.2f}  {chosen_by:22} {compensation:6}  {shown}", flush=True)

    if echo:
        print(f"{'keep':4}  {'heads chosen by':22} {'comp.':6}  " + "  ".join(names))
    add(1.0, "dense", "none", dense)
    for keep in keeps:
        for row in bench.rows(keep):
            add(keep, row.chosen_by, row.compensation, bench.perplexities(row))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; `--json FILE` writes it too, with the machine."""
    parser = argparse.ArgumentParser(prog="spp_bench.quality", description=__doc__)
    parser.add_argument("--scenario", type=Path, default=_DATA / "scenarios" / "chemistry.txt")
    parser.add_argument("--wrong", type=Path, default=_DATA / "scenarios" / "history.txt")
    parser.add_argument("--pool", type=Path, default=_DATA / "pools" / "chemistry")
    parser.add_argument("--keep", type=float, action="append", help="repeatable; 0.9, 0.8, 0.7")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args(arguments)
    bench = Bench(options.scenario, options.wrong, options.pool)
    records = run(bench, options.keep or [0.9, 0.8, 0.7], echo=True)
    if options.json:
        document = {
            "model": bench.session.source.name,
            "scenario": bench.scenario.name,
            "wrong_scenario": bench.wrong.name,
            "machine": machine(),
            "results": records,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
