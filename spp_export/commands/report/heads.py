"""The head map's part of a report: the dense model's sizes, and scores of heads where there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page import Heads, Scores
from spp_export.common.errors import ArtifactsError, PlanError
from spp_export.data.artifacts import Artifacts, bundled_artifacts, read_artifacts
from spp_export.planning import Plan

# Far more than any model has; a page of more cells would help nobody.
_MOST_HEADS, _MOST_CELLS = 1024, 100_000
_PREFERRED = "energy"


@dataclass(frozen=True)
class DenseCounts:
    """Query heads, KV heads and MLP channels of a layer of the dense model.

    channels: None where nothing says so. note: how the heads were inferred, if they were.
    """

    query_heads: int
    kv_heads: int
    channels: int | None = None
    note: str = ""


def dense_counts(plan: Plan, config: Mapping[str, Any], artifacts: Artifacts | None) -> DenseCounts:
    """What the dense model's layers have: as an export's config.json or the artifacts say, else
    the least that the plan's indices fit.

    Raises PlanError where no grouping of heads fits them, or there are too many to draw.
    """
    # A uniform export's config has the slim model's own counts.
    said = config if plan.written_layout != "uniform" else {}
    channels = _count(said.get("intermediate_size"))
    if channels is None and artifacts:
        channels = artifacts.channels
    kv_heads = _count(said.get("num_key_value_heads")) or _kv_heads(plan)
    query_heads = _count(said.get("num_attention_heads"))
    if query_heads is None and artifacts:
        query_heads = artifacts.query_heads
    if query_heads and kv_heads and _fits(plan, query_heads, kv_heads):
        return _drawable(plan, DenseCounts(query_heads, kv_heads, channels))
    least = kv_heads or 1 + max(layer.kv_heads[-1] for layer in plan.layers)
    size = _group_size(plan)
    note = (
        "The plan does not say how many heads the dense model has; the map shows as many as its "
        "indices need."
    )
    return _drawable(plan, DenseCounts(least * size, least, channels, note))


def matching_artifacts(plan: Plan, directory: str | None) -> Artifacts | None:
    """The artifacts given, or the default model's where the plan is for that model.

    Raises ArtifactsError for given ones of another model.
    """
    found = read_artifacts(Path(directory) if directory else bundled_artifacts())
    same = found.fingerprint == plan.model_fingerprint or (directory and not found.fingerprint)
    if same and found.num_layers == len(plan.layers):
        return found
    if directory:
        raise ArtifactsError(
            f"artifacts {directory}: made for the model {found.fingerprint[:16]} of "
            f"{found.num_layers} layers, the plan is for {plan.model_fingerprint[:16]} of "
            f"{len(plan.layers)}. Give those that the plan was made with."
        )
    return None


def heads_part(plan: Plan, counts: DenseCounts, artifacts: Artifacts | None) -> Heads:
    """What the head map shows."""
    scores = _scores(plan, counts, artifacts) if artifacts else None
    unscored = (
        ""
        if scores
        else "No score per head is shown: the plan holds none. --artifacts DIR, with the artifacts "
        "it was made with, adds them."
    )
    return Heads(plan.layers, counts.query_heads, counts.kv_heads, counts.note, scores, unscored)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= 1 << 24 else None


def _kv_heads(plan: Plan) -> int | None:
    """KV heads of a dense layer from the predicted bytes per token, which are proportional."""
    sizes = mapping(plan.predicted.get("kv_bytes_per_token"))
    dense, slim = number(sizes.get("dense")), number(sizes.get("slim"))
    if not dense or not slim:
        return None
    kept = sum(len(layer.kv_heads) for layer in plan.layers)
    found = dense / slim * kept / len(plan.layers)
    near = round(found)
    highest = max(layer.kv_heads[-1] for layer in plan.layers)
    return near if abs(found - near) < 1e-6 and highest < near <= _MOST_HEADS else None


def _group_size(plan: Plan) -> int:
    """The fewest query heads per KV head for which every layer's heads lie in its groups."""
    most = 1 + max(layer.query_heads[-1] for layer in plan.layers)
    for size in range(1, min(most, _MOST_HEADS) + 1):
        if _grouped(plan, size):
            return size
    raise PlanError(
        "plan: its query heads are not those of its KV groups, for any number of heads per group. "
        "Make it again with 'spp plan'."
    )


def _fits(plan: Plan, query_heads: int, kv_heads: int) -> bool:
    inside = all(
        layer.query_heads[-1] < query_heads and layer.kv_heads[-1] < kv_heads
        for layer in plan.layers
    )
    return inside and query_heads % kv_heads == 0 and _grouped(plan, query_heads // kv_heads)


def _grouped(plan: Plan, size: int) -> bool:
    return all(
        {head // size for head in layer.query_heads} == set(layer.kv_heads) for layer in plan.layers
    )


def _drawable(plan: Plan, counts: DenseCounts) -> DenseCounts:
    cells = counts.query_heads * len(plan.layers)
    if counts.query_heads > _MOST_HEADS or cells > _MOST_CELLS:
        raise PlanError(
            f"plan: {len(plan.layers)} layers of {counts.query_heads} query heads are more than a "
            f"page shows, {_MOST_CELLS} heads and {_MOST_HEADS} per layer."
        )
    return counts


def _scores(plan: Plan, counts: DenseCounts, artifacts: Artifacts) -> Scores | None:
    """Importance per head, mixed over domains as planning mixes it."""
    names = [name for name in artifacts.importance if name.startswith("head/")]
    chosen = f"head/{text(plan.criterion.get('name'))}"
    decided = chosen in names
    name = chosen if decided else f"head/{_PREFERRED}"
    weights = _weights(plan, artifacts.domains)
    if name not in names or weights is None:
        return None
    values = np.tensordot(weights, artifacts.importance[name].astype(np.float64), axes=1)
    if values.shape != (len(plan.layers), counts.query_heads):
        return None
    rows = tuple(tuple(float(value) for value in row) for row in values)
    shown = name.removeprefix("head/")
    return Scores(shown, _scores_note(plan, artifacts, shown, decided), rows)


def _weights(plan: Plan, domains: Sequence[str]) -> np.ndarray[Any, Any] | None:
    """A weight per domain: the mixture, shrunk towards all domains alike."""
    mixture = mapping(plan.diagnosis.get("mixture"))
    shares = [number(mixture.get(domain)) for domain in domains]
    known = [share for share in shares if share is not None and share >= 0]
    if len(known) < len(domains) or sum(known) <= 0:
        return None
    shrinkage = number(plan.calibration.get("shrinkage")) or 0.0
    found: np.ndarray[Any, Any] = shrinkage / len(domains) + (1 - shrinkage) * (
        np.array(known) / sum(known)
    )
    return found


def _scores_note(plan: Plan, artifacts: Artifacts, shown: str, decided: bool) -> str:
    criterion = text(plan.criterion.get("name")) or "no criterion of ours"
    sentences = [
        f"Point at a head, tap it, or move with the arrow keys to read its {shown} score: the "
        "artifacts' importance, mixed over domains as the diagnosis says."
    ]
    if not decided:
        sentences.append(
            f"It did not decide: the plan chose by {criterion}, which weighs whole sets of heads "
            "and leaves no score per head."
        )
    elif number(plan.calibration.get("scenario_weight")):
        sentences.append(
            "The scenario's own text, which had a part in the decision, is not in the artifacts."
        )
    if text(plan.artifacts.get("sha256")) != artifacts.sha256:
        sentences.append("These are not the very artifacts that the plan was made with.")
    return " ".join(sentences)
