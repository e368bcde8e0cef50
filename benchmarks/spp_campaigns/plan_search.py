"""Whether a search by the true KL finds a better plan than the exact one: `python -m
spp_campaigns.plan_search --model demo --scenario FILE --other FILE`.

Begins with the default plan and moves parameters as EvoPress does (Sieberling et al., arXiv
2410.14649): one layer takes the next smaller size of its heads or channels, another the best larger
one that the budget then allows, both re-fitted. A move stays where the KL to the dense model falls
on answers of the calibration text. Plans are compared on answers to held-out prompts of the
scenario, and of another one, that no move was chosen by.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spp_campaigns.choices import UNITS, Answers, opened, two_scenarios
from spp_campaigns.command import finish, machine, table
from spp_export.calibration.activations import TokenBatch, token_batches
from spp_export.calibration.mixture import WeightedTexts, gather_parts
from spp_export.calibration.reading import token_texts
from spp_export.calibration.refit import refit_blocks
from spp_export.common.arrays import IndexArray
from spp_export.evaluation.quality import documents_of, next_token_log_probabilities
from spp_export.models.families import Role
from spp_export.models.products import products
from spp_export.models.session import Session
from spp_export.planning.allocate.options import SetOptions
from spp_export.planning.allocate.sizes import Candidates, allocate, head_costs, width_costs
from spp_export.planning.budget import Budget
from spp_export.planning.planner import Planning
from spp_export.planning.request import PlanRequest
from spp_export.planning.scoring import UnitOptions
from spp_export.slicing.compensation import RIDGE
from spp_export.slicing.cut import kept_indices

_KEEP = 0.8
_TEXTS_OF_A_DOMAIN = 6
_BATCH_TOKENS = 1024
_COLUMNS = {
    "scenario": "{scenario}",
    "units": "{units}",
    "moves": "{kept} of {tried}",
    "KL, calibration": "{before[calibration]:.4f} to {after[calibration]:.4f}",
    "KL, held out": "{before[own][kl]:.4f} to {after[own][kl]:.4f}",
    "KL of another scenario": "{before[other][kl]:.4f} to {after[other][kl]:.4f}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for heads and one for heads and channels."""
    made = two_scenarios(__doc__)
    made.add_argument("--moves", type=int, default=60, help="moves to try")
    options = made.parse_args(arguments)
    session, artifacts, scenario, judges = opened(options, "auto")
    rows = []
    for units in UNITS:
        request = PlanRequest(units=units, criterion="fisher")
        planning = Planning.begin(session, artifacts, scenario, request)
        scoring, sizes = planning.scored["fisher"]
        search = _Search(session, sizes, scoring.parts, Budget(keep=_KEEP, units=units))
        before = search.figures(judges)
        search.run(options.moves)
        row = {
            "scenario": Path(options.scenario).stem,
            "units": units,
            "tried": options.moves,
            "kept": search.kept,
            "before": before,
            "after": search.figures(judges),
        }
        search.undo()
        rows.append(row)
        print(table(_COLUMNS, [row]).splitlines()[-1], flush=True)
    document = {"machine": machine(), "model": options.model, "rows": rows}
    finish(options, document, "", table(_COLUMNS, rows))


@dataclass(frozen=True)
class _Kind:
    """Heads or channels: what every layer may keep of them, and what reads them."""

    role: Role
    statistics: str
    candidates: Candidates


class _Search:
    """The dense model with the columns of what is removed at zero, the others re-fitted."""

    def __init__(
        self, session: Session, sizes: UnitOptions, parts: Sequence[WeightedTexts], budget: Budget
    ) -> None:
        source, shape = session.source, session.source.shape
        self._session, self._sizes = session, sizes
        self._limit = budget.limit(shape).cost
        assert isinstance(sizes.heads, SetOptions), "fisher weighs sets"
        costs = head_costs(shape, "parameters", sizes.heads.query_heads)
        candidates = Candidates.of_heads(sizes.heads, costs, shape.has_heads)
        self._kinds = [_Kind(Role.OUTPUT, "attention", candidates)]
        if sizes.channels is not None:
            widths = width_costs(shape, sizes.channels.widths)
            nested = Candidates.nested(sizes.channels, widths, shape.has_channels)
            self._kinds.append(_Kind(Role.DOWN, "mlp", nested))
        self._moments = gather_parts(session, parts, [kind.statistics for kind in self._kinds])
        self._dense = {
            (kind.role, layer): self._projection(kind, layer).weight
            for kind in self._kinds
            for layer in range(shape.num_layers)
        }
        self._weights: dict[tuple[Role, int, int], nn.Parameter] = {}
        assert not source.family.transposed, "weights with their inputs first"
        texts, weights = _sample(session, parts)
        batches = token_batches(session.tokenizer, texts, batch_tokens=_BATCH_TOKENS)
        counts = sum(torch.bincount(documents_of(b), minlength=len(texts)) for b in batches)
        self._text = [
            (batch, self._log_probabilities(batch), (weights / counts)[documents_of(batch)])
            for batch in batches
        ]
        picks, _ = allocate([kind.candidates for kind in self._kinds], self._limit)
        self._picks = [pick.tolist() for pick in picks]
        self.kept = 0
        for kind, chosen in enumerate(self._picks):
            for layer, size in enumerate(chosen):
                self._put(kind, layer, size)
        self.distance = self._measure()

    def figures(self, judges: dict[str, Answers]) -> dict[str, Any]:
        """KL on the calibration text, and what each judge measures."""
        found = {name: judge.judged(self._session.model) for name, judge in judges.items()}
        return {"calibration": round(self.distance, 4), **found}

    def run(self, moves: int) -> None:
        """Try so many moves, drawn with a seed."""
        numbers = random.Random(0)
        for _ in range(moves):
            move = self._drawn(numbers)
            before = [(kind, layer, self._picks[kind][layer]) for kind, layer, _ in move]
            self._take(move)
            distance = self._measure()
            if distance < self.distance:
                self.distance, self.kept = distance, self.kept + 1
            else:
                self._take(before)

    def undo(self) -> None:
        """The dense model again."""
        for kind in self._kinds:
            for layer in range(len(self._picks[0])):
                self._projection(kind, layer).weight = self._dense[kind.role, layer]

    def _drawn(self, numbers: random.Random) -> list[tuple[int, int, int]]:
        """A smaller size for one layer's units, and for another's the best larger one there is
        room for: (kind, layer, size) each."""
        places = [(kind, layer) for kind, of in enumerate(self._picks) for layer in range(len(of))]
        spent = sum(self._cost(kind, layer, self._picks[kind][layer]) for kind, layer in places)
        while True:
            (kind, layer), (other, place) = numbers.sample(places, 2)
            smaller = [
                size for size in self._others(kind, layer) if self._grows(kind, layer, size) < 0
            ]
            if not smaller:
                continue
            size = max(smaller, key=lambda size: self._grows(kind, layer, size))
            room = self._limit - spent - self._grows(kind, layer, size)
            larger = [
                size
                for size in self._others(other, place)
                if 0 < self._grows(other, place, size) <= room
            ]
            if larger:
                value = self._kinds[other].candidates.value[place]
                return [(kind, layer, size), (other, place, max(larger, key=value.__getitem__))]

    def _others(self, kind: int, layer: int) -> list[int]:
        value = self._kinds[kind].candidates.value[layer]
        return list(np.flatnonzero(value > -np.inf).tolist())

    def _cost(self, kind: int, layer: int, size: int) -> int:
        return int(self._kinds[kind].candidates.cost[layer, size])

    def _grows(self, kind: int, layer: int, size: int) -> int:
        return self._cost(kind, layer, size) - self._cost(kind, layer, self._picks[kind][layer])

    def _take(self, move: Sequence[tuple[int, int, int]]) -> None:
        for kind, layer, size in move:
            self._picks[kind][layer] = size
            self._put(kind, layer, size)

    def _put(self, number: int, layer: int, size: int) -> None:
        kind = self._kinds[number]
        key = (kind.role, layer, size)
        if key not in self._weights:
            dense = self._dense[kind.role, layer].detach().numpy()
            kept = self._inputs(kind, layer, size)
            weight = np.zeros_like(dense)
            blocks = self._moments.blocks(kind.statistics, layer)
            weight[:, kept] = refit_blocks(dense, blocks, kept, RIDGE) if kept.size else 0
            self._weights[key] = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        self._projection(kind, layer).weight = self._weights[key]

    def _inputs(self, kind: _Kind, layer: int, size: int) -> IndexArray:
        """Those that stay at a size."""
        if kind.role is Role.DOWN:
            assert self._sizes.channels is not None
            width = self._sizes.channels.widths[size]
            return np.flatnonzero(self._sizes.channels.rank[layer] < width)
        heads = self._sizes.heads
        assert isinstance(heads, SetOptions)
        columns = heads.value.shape[2]
        if size == heads.value[0].size:
            return np.empty(0, dtype=np.intp)
        kept = np.flatnonzero(heads.sets[layer, size // columns, size % columns])
        return kept_indices(kept.tolist(), self._session.source.shape.head_dim)

    def _projection(self, kind: _Kind, layer: int) -> Any:
        family = self._session.source.family
        name = family.layer_name(layer, family.projection(kind.role))
        return self._session.model.get_submodule(name)

    @torch.no_grad()
    def _log_probabilities(self, batch: TokenBatch) -> Tensor:
        with products(self._session.device, self._session.matmul):
            return next_token_log_probabilities(self._session.model, batch)[0]

    def _measure(self) -> float:
        """KL to the dense model: of a text, the mean over its answer; of all, as they count."""
        total = 0.0
        for batch, log_dense, weights in self._text:
            log_slim = self._log_probabilities(batch)
            total += float(((log_dense.exp() * (log_dense - log_slim)).sum(1) * weights).sum())
        return total


def _sample(session: Session, parts: Sequence[WeightedTexts]) -> tuple[list[Any], Tensor]:
    """All of the scenario's own texts and some of each domain's, and what each counts."""
    texts: list[Any] = []
    weights: list[float] = []
    numbers = random.Random(0)
    for part in parts:
        own = token_texts(session.tokenizer, part.texts)
        if part.domain is not None:
            own = numbers.sample(own, min(_TEXTS_OF_A_DOMAIN, len(own)))
        texts += own
        weights += [part.weight / len(own)] * len(own)
    return texts, torch.tensor(weights)


if __name__ == "__main__":
    main()
