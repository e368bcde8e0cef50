"""Layers that were cut learn, each by itself, to write what the dense model's do.

A slim layer reads the stream of the dense model and learns by its projections to leave it where the
dense layer does. Block by block this is what BRECQ does after quantisation (Li et al., arXiv
2102.05426). It goes on where `refit` stops, which solves for o_proj and down_proj alone. It takes
the memory to train one layer, and every token teaches as many numbers as the stream has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import (
    TokenBatch,
    input_device,
    model_inputs,
    token_batches,
)
from spp_export.calibration.reading import TokenText
from spp_export.common.progress import progress
from spp_export.models.families import Family
from spp_export.models.layer_runs import LayerRun, layer_runs
from spp_export.models.products import Matmul, products

# Adam's highest rate, as a share of each weight's root mean square. It rises for a twentieth of the
# steps, then falls as half a cosine does.
_RATE, _WARM = 0.005, 0.05
_BETAS = (0.9, 0.99)
_BATCH_TOKENS = 1024
# Of the texts, every so manieth is not taught, and says which round was best.
_WATCHED = 8
# Of a layer that writes nothing at all.
_LEAST = 1e-30

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerLearnt:
    """How far from the dense layer a slim one leaves the stream, before and after, on the texts
    that were not taught.

    The mean over tokens of |e|^2 / (|w|^2 + m): e is the difference of the streams, w what the
    dense layer adds to its own, and m the median of |w|^2.
    """

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class LayerText:
    """What layers learn on: texts, and how much a token of each counts, 1 on average."""

    texts: Sequence[TokenText]
    weights: Sequence[float]

    def batches(self) -> tuple[list[_Weighed], list[_Weighed]]:
        """Those that teach, and those that are watched."""
        places = range(len(self.texts))
        apart = places[_WATCHED - 1 :: _WATCHED]
        taught = [place for place in places if place not in apart]
        return self._batches(taught), self._batches(apart or places)

    def _batches(self, places: Sequence[int]) -> list[_Weighed]:
        weights = torch.tensor([self.weights[place] for place in places])
        batches = token_batches(
            None, [self.texts[place] for place in places], batch_tokens=_BATCH_TOKENS
        )
        return [
            _Weighed(one, weights[list(one.texts)].repeat_interleave(one.attention_mask.sum(1)))
            for one in batches
        ]


@dataclass(frozen=True)
class _Weighed:
    """A batch, and what each of its T real tokens counts [T]."""

    batch: TokenBatch
    weights: Tensor


def learn_layers(
    dense: nn.Module,
    slim: nn.Module,
    family: Family,
    cut: Sequence[int],
    text: LayerText,
    rounds: int,
    *,
    seed: int = 0,
    matmul: Matmul = "float32",
    known: Callable[[int], Values | None] = lambda layer: None,
    keep: Callable[[int, Values], None] = lambda layer, values: None,
) -> list[LayerLearnt]:
    """Train the projections of the layers `cut` of a slim model, in place, so many rounds over the
    text.

    A layer whose values are `known` takes these; what others learn is given to `keep`. Of the
    rounds the best counts, or the layer as it was where none is better. Raises ModelError as
    `layer_runs` does.
    """
    taught, watched = text.batches()
    both, device = [*taught, *watched], input_device(dense).type
    parameters = dict(slim.named_parameters())
    learnt: list[LayerLearnt] = []
    total = 2 * len(both) + len(cut) * rounds * len(taught)
    with progress("layers learn", float(total)) as advance_to:
        step = _Counter(advance_to)
        with products(device, matmul):
            of_dense, of_slim = (
                layer_runs(model, family, [model_inputs(model, of.batch) for of in both], step)
                for model in (dense, slim)
            )
        for index in range(max(cut, default=-1) + 1):
            whole, layer = (
                model.get_submodule(f"{family.layers}.{index}") for model in (dense, slim)
            )
            wanted = _written(of_dense, whole, index, matmul)
            names = [f"{family.layer_name(index, role)}.weight" for role in family.projections]
            trained = {name: parameters[name] for name in names if name in parameters}
            if index in cut and trained:  # some lose experts alone
                goals = list(map(_Goal.of, both, of_slim, wanted))
                lesson = _Lesson(layer, index, trained, goals, len(taught), matmul)
                before, values = lesson.watched_error(), known(index)
                if values is None:
                    keep(index, lesson.learn(rounds, seed, step))
                else:
                    lesson.restore(values)
                    step(rounds * len(taught))
                learnt.append(LayerLearnt(index, before, lesson.watched_error()))
                # Later layers of some families read keys and values of this one.
                _written(of_slim, layer, index, matmul)
            for run, other, stream in zip(of_dense, of_slim, wanted, strict=True):
                run.stream = other.stream = stream
    return learnt


@torch.no_grad()
def _written(
    runs: Sequence[LayerRun], layer: nn.Module, index: int, matmul: Matmul
) -> list[Tensor]:
    """The stream after a layer, of each run."""
    with products(input_device(layer).type, matmul):
        return [run.written(layer, index) for run in runs]


class _Counter:
    """Tells how many batches were read or taught."""

    def __init__(self, advance_to: Callable[[float], None]) -> None:
        self._done, self._advance_to = 0, advance_to

    def __call__(self, batches: int = 1) -> None:
        self._done += batches
        self._advance_to(float(self._done))


@dataclass(frozen=True)
class _Goal:
    """A run before a layer, where the stream should be after it [B,S,d], which tokens are real
    [B,S], and of each of the T real ones what it counts and |w|^2 of `LayerLearnt`, both [T]."""

    run: LayerRun
    wanted: Tensor
    real: Tensor
    weights: Tensor
    added: Tensor

    @classmethod
    def of(cls, weighed: _Weighed, run: LayerRun, wanted: Tensor) -> _Goal:
        """Of a batch whose run has the dense stream."""
        real = weighed.batch.attention_mask.bool().to(wanted.device)
        added = (wanted - run.stream)[real].square().sum(1)
        return cls(run, wanted, real, weighed.weights.to(wanted.device), added)


@dataclass
class _Lesson:
    """One layer of the slim model, and the goals of all batches: first of those that teach."""

    layer: nn.Module
    index: int
    trained: Mapping[str, nn.Parameter]
    goals: Sequence[_Goal]
    taught: int
    matmul: Matmul

    def __post_init__(self) -> None:
        added = torch.cat([goal.added for goal in self.goals])
        self._median = added.median().clamp_min(_LEAST)
        self._device = self._median.device.type

    def _distances(self, goal: _Goal) -> Tensor:
        """Of the T real tokens [T]."""
        with products(self._device, self.matmul):
            apart = goal.run.written(self.layer, self.index) - goal.wanted
        return apart[goal.real].square().sum(1) * goal.weights / (goal.added + self._median)

    @torch.no_grad()
    def watched_error(self) -> float:
        """The mean distance on the batches that do not teach."""
        found = torch.cat([self._distances(goal) for goal in self.goals[self.taught :]])
        return float(found.mean())

    def learn(self, rounds: int, seed: int, step: Callable[[], None]) -> Values:
        """Train; the values of the best round, which the layer has then."""
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        groups = [
            {"params": [of], "highest": _RATE * float(of.detach().square().mean().sqrt())}
            for of in self.trained.values()
        ]
        optimiser = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
        order = torch.Generator().manual_seed(seed)
        best, values = self.watched_error(), self.values()
        steps = rounds * self.taught
        for done in range(steps):
            if done % self.taught == 0:
                turn = torch.randperm(self.taught, generator=order).tolist()
            for group in optimiser.param_groups:
                group["lr"] = group["highest"] * _share_of_rate(done / steps)
            distance = self._distances(self.goals[turn[done % self.taught]]).mean()
            with products(self._device):
                distance.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step()
            if (done + 1) % self.taught == 0 and (error := self.watched_error()) < best:
                best, values = error, self.values()
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        self.restore(values)
        return values

    def values(self) -> Values:
        """What is trained, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.trained.items()}

    def restore(self, values: Values) -> None:
        """Take values of before."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(values[name])


def _share_of_rate(passed: float) -> float:
    return min(1.0, (passed + 1e-3) / _WARM) * 0.5 * (1 + math.cos(math.pi * passed))
