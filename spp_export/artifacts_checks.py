"""What must hold inside a record of artifacts, whether read, imported or about to be written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_export.common.errors import ArtifactsError
from spp_export.common.json_files import shown

if TYPE_CHECKING:
    from spp_export.data.artifacts import Array, Artifacts

_SETTINGS = {
    "regime_choice": ("known", "share"),
    "shrinkage": ("chosen",),
    "scenario_weight": ("chosen",),
}
# Larger ones would leave the range of float32 once they are squared and summed.
_LARGEST = 1e15
_SMALLEST_TEMPERATURE = 1e-6
_SHOWN = 12
_MOST_NAMES, _LONGEST_NAME = 256, 80
_CRITERION = re.compile(r"(head|channel)/[a-z0-9][a-z0-9_-]*")


def check_artifacts(artifacts: Artifacts, label: str) -> None:
    """Raise ArtifactsError unless everything in the record agrees."""
    _check_names(artifacts.domains, f"{label}: domain")
    _check_names(artifacts.regimes, f"{label}: regime")
    weight = artifacts.weight
    if weight.ndim != 3 or 0 in weight.shape:
        raise ArtifactsError(
            f"{label}: expected weight [layers, domains, hidden], got {weight.shape}."
        )
    layers, _, hidden = weight.shape
    count, regimes = len(artifacts.domains), len(artifacts.regimes)
    _check_array(weight, (layers, count, hidden), f"{label}: weight")
    _check_array(artifacts.bias, (layers, count), f"{label}: bias")
    _check_array(artifacts.temperature, (regimes, layers), f"{label}: temperature")
    _check_array(artifacts.axes, (count, hidden), f"{label}: axes")
    if not (artifacts.temperature >= _SMALLEST_TEMPERATURE).all():
        raise ArtifactsError(
            f"{label}: expected temperatures above 0, of at least {_SMALLEST_TEMPERATURE}, got "
            f"{float(artifacts.temperature.min()):.3g}."
        )
    _check_importance(artifacts.importance, count, layers, label)
    _check_whitelist(artifacts, label)
    _check_probe_layers(artifacts, label)
    _check_settings(artifacts, label)
    for number, (domain, _) in enumerate(artifacts.calibration, start=1):
        if domain not in artifacts.domains:
            raise ArtifactsError(
                f"{label}: calibration text {number} is of the domain {domain!r:.60}, "
                f"known are {', '.join(artifacts.domains):.300}."
            )


def _check_names(names: tuple[str, ...], label: str) -> None:
    if not names:
        raise ArtifactsError(f"{label}s: expected at least one name, got none.")
    if len(names) > _MOST_NAMES:
        raise ArtifactsError(f"{label}s: expected at most {_MOST_NAMES} names, got {len(names)}.")
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ArtifactsError(
                f"{label} {shown(name)}: expected printable text that is not empty."
            )
        if len(name) > _LONGEST_NAME:
            raise ArtifactsError(
                f"{label} {shown(name)}: expected at most {_LONGEST_NAME} characters, got "
                f"{len(name)}."
            )
    if len(set(names)) < len(names):
        raise ArtifactsError(f"{label}s: expected distinct names, got {', '.join(names):.300}.")


def _check_array(array: Array, shape: tuple[int, ...], label: str) -> None:
    if array.dtype != np.float32:
        raise ArtifactsError(f"{label}: expected float32, got {array.dtype}.")
    if array.shape != shape:
        raise ArtifactsError(f"{label}: expected the shape {shape}, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ArtifactsError(f"{label}: holds a value that is not finite.")
    if np.abs(array).max(initial=0) > _LARGEST:
        raise ArtifactsError(
            f"{label}: holds a value beyond {_LARGEST:g}, which float32 cannot compute with."
        )


def _check_importance(
    importance: Mapping[str, Array], domains: int, layers: int, label: str
) -> None:
    units: dict[str, int] = {}
    for name, array in importance.items():
        if not _CRITERION.fullmatch(name):
            raise ArtifactsError(
                f"{label}: expected importance named head/... or channel/..., got {name!r:.60}."
            )
        if array.ndim != 3 or array.shape[2] == 0:
            raise ArtifactsError(
                f"{label}: {name}: expected [domains, layers, units], got {array.shape}."
            )
        count = units.setdefault(name.partition("/")[0], array.shape[2])
        _check_array(array, (domains, layers, count), f"{label}: {name}")
    if "head" not in units:
        raise ArtifactsError(f"{label}: expected importance of heads (head/...), got none.")


def _check_whitelist(artifacts: Artifacts, label: str) -> None:
    layers, heads = artifacts.num_layers, artifacts.query_heads
    for layer, head in artifacts.whitelist:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ArtifactsError(
                f"{label}: whitelist: layer {shown(layer)}, head {shown(head)} does not exist; "
                f"the model has {layers} layers of {heads} heads."
            )
    if len(set(artifacts.whitelist)) < len(artifacts.whitelist):
        raise ArtifactsError(f"{label}: whitelist: a head is listed twice.")


def _check_probe_layers(artifacts: Artifacts, label: str) -> None:
    layers = artifacts.manifest.get("probe_layers")
    if layers is None:
        return
    if not isinstance(layers, (list, tuple)) or any(type(layer) is not int for layer in layers):
        raise ArtifactsError(f"{label}: manifest: probe_layers: expected a list of integers.")
    inside = all(0 <= layer < artifacts.num_layers for layer in layers)
    if not layers or not inside or list(layers) != sorted(set(layers)):
        first = ", ".join(shown(layer) for layer in layers[:_SHOWN])
        raise ArtifactsError(
            f"{label}: manifest: probe_layers: expected ascending layers below "
            f"{artifacts.num_layers}, got {first or 'none'}."
        )


def _check_settings(artifacts: Artifacts, label: str) -> None:
    """What the manifest says of how a scenario is to be read: all shares."""
    for section, names in _SETTINGS.items():
        value = artifacts.manifest.get(section, {})
        if not isinstance(value, Mapping):
            raise ArtifactsError(f"{label}: manifest: {section}: expected a JSON object.")
        for name in names:
            number = value.get(name, 0)
            if type(number) not in (int, float) or not 0 <= number <= 1:
                raise ArtifactsError(
                    f"{label}: manifest: {section}.{name}: expected a number from 0 to 1, "
                    f"got {number!r:.40}."
                )


def whitelist_pairs(value: Any, label: str) -> tuple[tuple[int, int], ...]:
    """`[[layer, head], ...]` of a whitelist.json as pairs; ArtifactsError for anything else."""
    pairs: list[tuple[int, int]] = []
    for pair in value if isinstance(value, list) else [value]:
        # type(), since JSON's true is an int to isinstance
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int]:
            raise ArtifactsError(f"{label}: expected a list of [layer, head], got {pair!r:.60}.")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
