"""What a record must do: sliced by it alone, a model computes what the dense one does with the
removed units masked, in float64, with a cache and without.

Judged on tiny random models and random plans, so that nothing of a family has to be trusted.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_export.common.errors import ModelError
from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from spp_export.models.families import record_of
from spp_export.models.loader import auto_class
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning import LayerPlan, Layout, Plan
from spp_export.planning.plan import only_existing
from spp_export.slicing.compensation import written_config
from spp_export.slicing.config import MODELING_FILES
from spp_export.slicing.weights import write_slim_weights

# The largest difference of logits of about 1 that rounding in float64 explains.
LIMIT = 1e-12
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "max_new_tokens": 6,
    "min_new_tokens": 6,
}
# Below it, logits are all alike and compare nothing.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Pair:
    """A dense checkpoint, what is kept of it, and where that is."""

    source: Checkpoint
    plan: Plan
    slim: Path

    def masked(self) -> AbstractContextManager[Any]:
        """The dense model, masked, while the context is open."""
        dense = load_exact(self.source.path)
        return masked_dense(dense, self.source.family, self.source.shape, self.plan)

    def as_planned(self) -> bool:
        """Whether the layers on disk have the sizes that the plan gives them."""
        opened, layers = open_checkpoint(self.slim), self.plan.layer_shapes(self.source.shape)
        if _of_experts(opened.shape, opened.layers) != _of_experts(self.source.shape, layers):
            return False
        if opened.layout == "uniform":  # a dense model of its own, which has not dropped any
            alone = opened.family.experts and not opened.family.down  # none that is cut
            width = opened.shape.channels if alone else None
            layers = opened.shape.existing(
                [
                    replace(
                        layer,
                        channels=layer.channels if width is None else width,
                        dropped_experts=0,
                        dropped_channels=0,
                    )
                    for layer in layers
                ]
            )
        return opened.layers == layers


def _of_experts(shape: ModelShape, layers: Sequence[LayerShape]) -> list[tuple[int, int]]:
    """How many each layer has, and channels of each of them."""
    counts = [count for count in shape.experts_in(layers) if count]
    return list(zip(counts, shape.expert_widths(layers) or [0] * len(counts), strict=True))


@dataclass(frozen=True)
class Distances:
    """How far a slim model is from the masked dense one: the largest differences of logits, in
    float64 throughout.

    logits  of a prompt
    cached  of the tokens that each of them generates with a cache
    padded  of both, where a row of the prompt has padding before it
    again   of a prompt, after the slim model saved itself and was loaded again
    """

    logits: float
    cached: float
    padded: float
    again: float


def prove(source: Checkpoint, layout: Layout, target: Path) -> float:
    """`check` of a random slice of a tiny `source`, which is written to `target`."""
    return check(make_slim(source, layout, target))


def check(pair: Pair) -> float:
    """The largest difference of logits between a slice and the dense model with the same units
    masked, where everything holds.

    Raises ModelError for the first thing that does not: shapes of layers, logits, or the tokens of
    greedy generation with a cache and without.
    """
    layout = pair.plan.layout
    if not pair.as_planned():
        raise ModelError(f"layout {layout}: layers have other sizes than the plan gives them.")
    slim = load_exact(pair.slim)
    with torch.no_grad(), pair.masked() as masked:
        expected = exact_logits(masked)
        follows = {use_cache: greedy(masked, use_cache=use_cache) for use_cache in (True, False)}
    difference = float((exact_logits(slim) - expected).abs().max())
    if not difference <= LIMIT or float(expected.std()) <= _LEAST_SPREAD:
        raise ModelError(
            f"layout {layout}: logits differ from those of the masked dense model by up to "
            f"{difference:.2g}, at most {LIMIT:g} was expected."
        )
    for use_cache, tokens_of_dense in follows.items():
        if not torch.equal(greedy(slim, use_cache=use_cache), tokens_of_dense):
            raise ModelError(
                f"layout {layout}: generation {'with' if use_cache else 'without'} a cache gives "
                "other tokens than the masked dense model."
            )
    return difference


def distances(pair: Pair, folder: Path) -> Distances:
    """How far a slice is from the masked dense model; `folder` is where it saves itself again."""
    plain, slim = {"input_ids": tokens()}, load_exact(pair.slim)
    with quiet_transformers():
        slim.save_pretrained(folder)
    again = load_exact(folder)
    with torch.no_grad(), pair.masked() as masked, _InDouble():
        expected = masked(**plain).logits
        return Distances(
            logits=_apart(slim(**plain).logits, expected),
            cached=_apart(_generated(slim, plain), _generated(masked, plain)),
            padded=_apart(_behind_padding(slim), _behind_padding(masked)),
            again=_apart(again(**plain).logits, expected),
        )


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, which is not finite where one of them is not."""
    return float((one - other).abs().max())


def _generated(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [B,6,V] of greedy tokens, with a cache."""
    shown = {"output_logits": True, "return_dict_in_generate": True, "use_cache": True}
    return torch.stack(model.generate(**inputs, **_GREEDY, **shown).logits, dim=1)


def _behind_padding(model: Any) -> Tensor:
    """Logits [N,V] of the prompt with padding, where it is none, and of what follows."""
    ids, attends = _padding()
    inputs = {"input_ids": ids, "attention_mask": attends}
    prompt = model(**inputs).logits[attends == 1]
    return torch.cat([prompt, _generated(model, inputs).flatten(0, 1)])


@torch.no_grad()
def exact_logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Logits [2,11,V] of `tokens`, or of other inputs, in float64 throughout where the model has
    experts."""
    with _exactly(model):
        logits: Tensor = model(**(inputs or {"input_ids": tokens()})).logits
    return logits


def _exactly(model: PreTrainedModel) -> AbstractContextManager[object]:
    config = model.config.to_dict()
    family = record_of(config)
    return _InDouble() if family and family.of(config).experts else nullcontext()


class _InDouble(TorchFunctionMode):
    """What a model computes in float32 whatever its weights are, it computes in float64: routers
    do, and how their products are rounded depends on the number of experts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def tokens() -> torch.Tensor:
    """Token ids [2,11] of a tiny model, whose vocabulary has at least 97."""
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def padded(model: Any) -> dict[str, torch.Tensor]:
    """The same, as a prompt whose first row has padding before it.

    Without that row for a model that knows eager attention alone: in float64 a mask's lowest value
    becomes -inf in its softmax, and a row of padding NaN.
    """
    ids, attends = _padding()
    first = 1 if model.config._attn_implementation == "eager" else 0
    return {"input_ids": ids[first:], "attention_mask": attends[first:]}


def _padding() -> tuple[Tensor, Tensor]:
    """Token ids [2,11], the first four of the first row being padding, and what is attended."""
    ids, attends = tokens(), torch.ones(2, 11, dtype=torch.long)
    ids[0, :4], attends[0, :4] = 0, 0
    return ids, attends


def greedy(model: Any, **options: Any) -> torch.Tensor:
    """Six tokens after the padded prompt."""
    with _exactly(model):
        generated: Tensor = model.generate(**padded(model), **_GREEDY, **options)
    return generated


def load_exact(path: Path, **options: Any) -> PreTrainedModel:
    """A tiny checkpoint in float64. Raises ModelError where tensors are missing or left over."""
    config = json.loads((path / "config.json").read_text())
    family = record_of(config)
    assert family is not None
    family = family.of(config)
    if family.experts and hasattr(PreTrainedModel, "set_experts_implementation"):
        options["experts_implementation"] = "eager"  # others know no float64
    with quiet_transformers():
        loaded: Any = auto_class(family).from_pretrained(
            path, dtype=torch.float64, output_loading_info=True, **options
        )
    model, report = loaded
    if wrong := {what: sorted(map(str, names)) for what, names in report.items() if names}:
        raise ModelError(f"{path}: transformers loads it with {wrong}.")
    assert isinstance(model, PreTrainedModel)
    return model


def write_random(settings: Any, target: Path, dtype: torch.dtype = torch.float64) -> Path:
    """`random_model` of a config, on disk."""
    model = random_model(settings, dtype)
    with quiet_transformers():
        model.save_pretrained(target)
    return target


def random_model(settings: Any, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of a config, made by the stock classes: none of its norms and biases can be
    left out unnoticed."""
    torch.manual_seed(0)
    sees = hasattr(settings, "text_config")
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(settings, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    model.eval()
    return model


def make_slim(
    source: Checkpoint, layout: Layout, target: Path, layers: tuple[LayerPlan, ...] | None = None
) -> Pair:
    """Sliced on disk, as an export is, by a plan of these layers or a random one."""
    layers = _random_plan(source, layout) if layers is None else layers
    plan = Plan(source.fingerprint, source.name, layout, "none", layers)
    target.mkdir()
    write_slim_weights(source, plan, target, kept=False)
    (target / "config.json").write_text(json.dumps(written_config(source, plan)))
    for file in MODELING_FILES if layout != "uniform" else ():
        shutil.copy(file, target)
    return Pair(source, plan, target)


def _random_plan(source: Checkpoint, layout: Layout) -> tuple[LayerPlan, ...]:
    if layout == "uniform":
        width = 10 if source.family.down else None
        size = min(2, source.shape.group_size)
        heads = {"kv_heads": 2 // size, "group_size": size}
        if source.family.uniform != "all":  # its stock config takes no fewer
            heads = {"kv_heads": source.shape.kv_heads, "group_size": source.shape.group_size}
        layers = uniform_layers(source.shape, 3, **heads, channels=width)
    else:
        chosen = ragged_layers if layout == "ragged" else random_layers
        layers = chosen(source.shape, 3, channels=bool(source.family.down))
    if any(source.shape.sparse) and layout != "per-layer":  # where heads alone go
        layers = drop_experts(layers, source.shape, 3, alike=layout == "uniform")
    experts = source.family.experts
    stays = layout == "uniform" and experts is not None and experts.beside
    if source.shape.expert_channels and not stays:
        layers = narrow_experts(layers, source.shape, 3, alike=layout == "uniform")
    return only_existing(layers, source.shape)


def random_layers(shape: ModelShape, seed: int, *, channels: bool = True) -> tuple[LayerPlan, ...]:
    """A random regular plan that keeps at least one unit of each kind in every layer."""
    rng = random.Random(seed)
    return tuple(_random_layer(shape, rng, channels) for _ in range(shape.num_layers))


def _random_layer(shape: ModelShape, rng: random.Random, channels: bool) -> LayerPlan:
    kv_heads = _choose(rng, range(shape.kv_heads), rng.randint(1, shape.kv_heads))
    size = rng.randint(1, shape.group_size)
    query_heads: list[int] = []
    for head in kv_heads:
        group = range(head * shape.group_size, (head + 1) * shape.group_size)
        query_heads += _choose(rng, group, size)
    kept = _choose(rng, range(shape.channels), rng.randint(1, shape.channels)) if channels else None
    return LayerPlan(kv_heads, tuple(query_heads), kept)


def ragged_layers(shape: ModelShape, seed: int, *, channels: bool = True) -> tuple[LayerPlan, ...]:
    """Random query heads of every layer; where groups can differ, they do in the first that has
    heads."""
    rng = random.Random(seed)
    plans = []
    for index in range(shape.num_layers):
        heads = _choose(rng, range(shape.query_heads), rng.randint(1, shape.query_heads))
        if index == shape.has_heads.index(True) and shape.kv_heads > 1:
            heads = (*range(shape.group_size), shape.group_size)
        kv_heads = tuple(sorted({head // shape.group_size for head in heads}))
        width = rng.randint(1, shape.channels)
        kept = _choose(rng, range(shape.channels), width) if channels else None
        plans.append(LayerPlan(kv_heads, heads, kept))
    return tuple(plans)


def uniform_layers(
    shape: ModelShape, seed: int, *, kv_heads: int, group_size: int, channels: int | None = None
) -> tuple[LayerPlan, ...]:
    """Random units, but the same number of each in every layer."""
    rng = random.Random(seed)
    plans = []
    for _ in range(shape.num_layers):
        kept = _choose(rng, range(shape.kv_heads), kv_heads)
        heads: list[int] = []
        for head in kept:
            start = head * shape.group_size
            heads += _choose(rng, range(start, start + shape.group_size), group_size)
        width = None if channels is None else _choose(rng, range(shape.channels), channels)
        plans.append(LayerPlan(kept, tuple(heads), width))
    return tuple(plans)


def drop_experts(
    layers: Sequence[LayerPlan], shape: ModelShape, seed: int, *, alike: bool = False
) -> tuple[LayerPlan, ...]:
    """The same layers with random experts: in turn as few as can be, the next number, and so on, or
    in all layers `alike` all but the fewest that can go."""
    rng, layers, size = random.Random(seed), list(layers), shape.experts // shape.expert_groups
    counts = shape.expert_counts[:-1] or shape.expert_counts
    for turn, index in enumerate(index for index, sparse in enumerate(shape.sparse) if sparse):
        kept = (counts[-1] if alike else counts[turn % len(counts)]) // shape.expert_groups
        groups = (range(start, start + size) for start in range(0, shape.experts, size))
        experts = tuple(expert for group in groups for expert in _choose(rng, group, kept))
        layers[index] = replace(layers[index], experts=experts)
    return tuple(layers)


def narrow_experts(
    layers: Sequence[LayerPlan], shape: ModelShape, seed: int, *, alike: bool = False
) -> tuple[LayerPlan, ...]:
    """The same layers with random channels of every expert: as many in all experts of a layer, and
    another number in each layer unless they are to be `alike`."""
    rng, layers, width = random.Random(seed), list(layers), shape.expert_channels
    for turn, index in enumerate(index for index, sparse in enumerate(shape.sparse) if sparse):
        count = max(1, width // 2 - (0 if alike else turn))
        experts = layers[index].experts
        stay = shape.experts if experts is None else len(experts)
        rows = tuple(_choose(rng, range(width), count) for _ in range(stay))
        layers[index] = replace(layers[index], expert_channels=rows)
    return tuple(layers)


def _choose(rng: random.Random, units: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(units, count)))
