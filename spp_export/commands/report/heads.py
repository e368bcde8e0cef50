"""The head map's part of a report: the dense model's sizes, and scores of heads where there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page.figures import figure, nth, ranges
from spp_export.common.errors import ArtifactsError, PlanError
from spp_export.data.artifacts import Artifacts, bundled_artifacts, read_artifacts
from spp_export.models.families import record_of
from spp_export.planning import LayerPlan, Plan

# Far more than any model has; a page of more cells would help nobody.
_MOST_HEADS, _MOST_CELLS = 1024, 100_000
_PREFERRED = "energy"
# A layer's column in pixels; on narrow screens it shrinks to _LEAST, and then the map scrolls.
_WIDEST, _NARROWEST, _ROOM, _LEAST = 32, 11, 980, 13
# Room on the left for numbers of heads and names of KV groups.
_LEFT = 54
STATES = {
    "kept": "kept",
    "removed": "removed",
    "gone": "removed with its KV group",
}


@dataclass(frozen=True)
class Scores:
    """A figure per query head, `values[layer][head]`.

    decided: whether the plan chose by it, `whole` whether by nothing else. same: whether the
    artifacts are those that the plan was made with.
    """

    name: str
    values: list[list[float]]
    decided: bool
    whole: bool
    same: bool


@dataclass(frozen=True)
class Heads:
    """The head map: which heads of the dense model stay.

    query_heads: of a dense layer; where that is not `recorded`, up to the highest that is kept.
    kv_heads: of a dense layer; None where that is not recorded. channels: the same of its MLP.
    without_heads: the layers that have none in the dense model.
    """

    layers: tuple[LayerPlan, ...]
    query_heads: int
    recorded: bool
    kv_heads: int | None
    channels: int | None
    scores: Scores | None = None
    without_heads: frozenset[int] = frozenset()

    @property
    def group_size(self) -> int | None:
        """Query heads per KV head of the dense model."""
        return self.query_heads // self.kv_heads if self.kv_heads else None

    @property
    def attending(self) -> list[int]:
        """The layers that have heads in the dense model."""
        return [i for i in range(len(self.layers)) if i not in self.without_heads] or [0]

    @property
    def kept(self) -> int:
        """Query heads of all layers that stay."""
        return sum(len(layer.query_heads) for layer in self.layers)

    @property
    def kept_groups(self) -> int:
        """KV heads of all layers that stay."""
        return sum(len(layer.kv_heads) for layer in self.layers)

    @property
    def cell(self) -> int:
        """Width of a layer's column, and of a head's row: what fits the page, within reason."""
        return min(max(_ROOM // len(self.layers), _NARROWEST), _WIDEST)

    @property
    def width(self) -> int:
        """Of the whole map."""
        return self.x(len(self.layers)) + 2

    @property
    def style(self) -> str:
        """What the page's style says of the map."""
        narrow = min(self.width, _LEFT + _LEAST * len(self.layers))
        return f"svg.map{{min-width:{narrow}px;max-width:{self.width}px}}\n"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Per layer: its number, how many query heads stay, which, and which KV groups."""
        of = f" of {self.query_heads}" if self.recorded else ""
        return [
            (
                str(index),
                "none to cut" if index in self.without_heads else f"{len(layer.query_heads)}{of}",
                ranges(layer.query_heads),
                ranges(layer.kv_heads),
            )
            for index, layer in enumerate(self.layers)
        ]

    def x(self, layer: int) -> int:
        """Left edge of a layer's column."""
        return _LEFT + self.cell * layer

    def state(self, layer: int, head: int) -> str:
        """Whether a head stays, and why not: a key of `STATES`, or "none" where there is none."""
        kept = self.layers[layer]
        if layer in self.without_heads:
            return "none"
        if head in kept.query_heads:
            return "kept"
        size = self.group_size
        return "removed" if size is None or head // size in kept.kv_heads else "gone"

    def counted(self, state: str) -> int:
        """How many heads of all layers are in this state."""
        cells = ((i, head) for i in range(len(self.layers)) for head in range(self.query_heads))
        return sum(self.state(layer, head) == state for layer, head in cells)

    def title(self, layer: int, head: int) -> str:
        """Where a head is, what became of it, and its score."""
        state, size = self.state(layer, head), self.group_size
        lines = [f"Layer {layer}, query head {head}", STATES[state]]
        if size:
            words = {
                "removed": "removed; its KV group stays",
                "gone": "removed with its whole KV group",
            }
            lines[1] = f"KV group {head // size}, {words.get(state, state)}"
        if self.scores:
            row = self.scores.values[layer]
            rank = 1 + sum(score > row[head] for score in row)
            score = f"{self.scores.name} {figure(row[head])}"
            lines.append(f"{score}, {nth(rank)} of {len(row)} in its layer")
        return "\n".join(lines)


def heads_of(plan: Plan, config: Mapping[str, Any], artifacts: Artifacts | None) -> Heads:
    """What the head map shows; the dense model's sizes are those in config.json or the artifacts.

    Raises PlanError where the plan's heads are not among these, or there are too many to draw.
    """
    # A uniform export's config has the slim model's own sizes.
    sizes = config if plan.written_layout != "uniform" else {}
    record = record_of(config)
    width = record.width_key if record else "intermediate_size"
    query_heads, kv_heads, channels = (
        _size(sizes.get(name)) for name in ("num_attention_heads", "num_key_value_heads", width)
    )
    if artifacts:
        query_heads = query_heads or artifacts.query_heads
        channels = channels or artifacts.channels
    shown = query_heads or 1 + max(max(layer.query_heads, default=0) for layer in plan.layers)
    if shown > _MOST_HEADS or shown * len(plan.layers) > _MOST_CELLS:
        raise PlanError(
            f"plan: {len(plan.layers)} layers of {shown} query heads are more than a page shows, "
            f"{_MOST_CELLS} heads and {_MOST_HEADS} per layer."
        )
    if query_heads:
        _check_heads(plan, query_heads, kv_heads)
    else:
        kv_heads = None
    for index, layer in enumerate(plan.layers):
        if channels and layer.channels and layer.channels[-1] >= channels:
            raise PlanError(
                f"plan: layer {index} keeps channel {layer.channels[-1]} of {channels} channels. "
                "Make it again with 'spp plan'."
            )
    scores = _scores(plan, shown, artifacts) if artifacts else None
    recorded = query_heads is not None
    without = plan.without_heads
    return Heads(plan.layers, shown, recorded, kv_heads, channels, scores, without)


def matching_artifacts(plan: Plan, directory: str | None) -> Artifacts | None:
    """The artifacts in `directory`, or the default model's where the plan is for that model.

    Raises ArtifactsError for a directory's that are of another model.
    """
    artifacts = read_artifacts(Path(directory) if directory else bundled_artifacts())
    same = artifacts.fingerprint == plan.model_fingerprint or (
        directory and not artifacts.fingerprint
    )
    if same and artifacts.num_layers == len(plan.layers):
        return artifacts
    if directory:
        raise ArtifactsError(
            f"artifacts {directory}: made for the model {artifacts.fingerprint[:16]} of "
            f"{artifacts.num_layers} layers, the plan is for {plan.model_fingerprint[:16]} of "
            f"{len(plan.layers)}. Give those that the plan was made with."
        )
    return None


def _size(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= 1 << 24 else None


def _check_heads(plan: Plan, query_heads: int, kv_heads: int | None) -> None:
    """PlanError where a layer's heads are not among the dense model's, each in a KV group kept."""
    groups = kv_heads or query_heads
    size, rest = divmod(query_heads, groups)
    for index, layer in enumerate(plan.layers):
        inside = all(head < query_heads for head in layer.query_heads[-1:])
        inside = inside and all(group < groups for group in layer.kv_heads[-1:])
        grouped = not rest and {head // size for head in layer.query_heads} == set(layer.kv_heads)
        if not inside or (kv_heads and not grouped):
            raise PlanError(
                f"plan: layer {index} keeps query heads that are not those of its KV groups in a "
                f"model of {query_heads} query heads and {kv_heads or 'unknown'} KV heads. "
                "Make it again with 'spp plan'."
            )


def _scores(plan: Plan, query_heads: int, artifacts: Artifacts) -> Scores | None:
    """Importance per head, mixed over domains as planning mixes it."""
    names = [name for name in artifacts.importance if name.startswith("head/")]
    chosen = f"head/{text(plan.criterion.get('name'))}"
    decided = chosen in names
    name = chosen if decided else f"head/{_PREFERRED}"
    weights = _weights(plan, artifacts.domains)
    if name not in names or weights is None:
        return None
    values = np.tensordot(weights, artifacts.importance[name].astype(np.float64), axes=1)
    if values.shape != (len(plan.layers), query_heads):
        return None
    return Scores(
        name.removeprefix("head/"),
        values.tolist(),
        decided=decided,
        whole=not number(plan.calibration.get("scenario_weight")),
        same=text(plan.artifacts.get("sha256")) == artifacts.sha256,
    )


def _weights(plan: Plan, domains: Sequence[str]) -> np.ndarray[Any, Any] | None:
    """A weight per domain: the mixture, shrunk towards all domains alike."""
    mixture = mapping(plan.diagnosis.get("mixture"))
    shares = [number(mixture.get(domain)) for domain in domains]
    known = [share for share in shares if share is not None and share >= 0]
    if len(known) < len(domains) or sum(known) <= 0:
        return None
    shrinkage = number(plan.calibration.get("shrinkage")) or 0.0
    alike = shrinkage / len(domains)
    weights: np.ndarray[Any, Any] = alike + (1 - shrinkage) * (np.array(known) / sum(known))
    return weights
