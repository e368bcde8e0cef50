"""The artifact format of SubspacePath Pruner (ICML 2026) as released, to ours.

What it does not hold stays absent: the model's fingerprint, our criteria, axes (zeros here),
calibration text. Two rules fill its gaps: a layer without a temperature gets 1.0, and a layer
without a probe gets a zero one and is left out of the manifest's `probe_layers`.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.common.errors import ArtifactsError
from spp_export.common.json_files import MAX_JSON_BYTES, json_object, parse_json, read_bytes
from spp_export.data.artifacts import Array, Artifacts, check_artifacts, whitelist_pairs

# No published file stores the names; this is the order its scripts default to.
PUBLISHED_DOMAINS = ("chemistry", "finance", "history", "math", "philosophy", "technology")
PUBLISHED_CRITERION = "head/published"
PUBLISHED_TEMPERATURES = {
    "in-domain": "probe2_single_domain_layer_wise",
    "cross-domain": "probe4_cross_domain_layer_wise",
    "out-of-domain": "probe3_ood_layer_wise",
}
_PIPELINE = "ppd_pipeline"
_PROBES = "probe1_base.pt"
_MAX_PROBE_BYTES = 16 << 20
_MAX_SIZE = 1 << 16
_LARGEST = 1e30


class _Folder:
    """The files of a published directory, each read within limits and its hash noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sha256: dict[str, str] = {}

    def label(self, name: str) -> str:
        return f"published artifacts {self.root / name}"

    def read(self, name: str, max_bytes: int) -> bytes:
        what = "published artifacts"
        data = read_bytes(
            self.root / name, what=what, max_bytes=max_bytes, error=ArtifactsError, pipe=False
        )
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        return data

    def mapping(self, name: str) -> dict[str, Any]:
        data = self.read(name, MAX_JSON_BYTES)
        value = parse_json(data, what=self.label(name), error=ArtifactsError)
        return json_object(value, f"{self.label(name)}: the document", ArtifactsError)


def import_published(
    directory: str | os.PathLike[str], domains: Sequence[str] | None = None
) -> Artifacts:
    """Artifacts from a published `ppd_pipeline` directory, or from the directory around it.

    `domains` names the K domains in the order of the files; six default to the published order.
    The probes are torch files, read with `weights_only=True`, so that no code in them runs.
    Importance becomes `head/published` [K,L,H]; the fingerprint is "", for unknown. Raises
    ArtifactsError where a file is missing, malformed or contradicts another.
    """
    root = Path(directory)
    folder = _Folder(root / _PIPELINE if (root / _PIPELINE).is_dir() else root)
    importance = _importance(folder)
    count, layers, _ = importance.shape
    names = _domain_names(domains, count, folder)
    weight, bias, probe_layers = _probes(folder, layers, count)
    temperature, calibrated = _temperatures(folder, layers)
    artifacts = Artifacts(
        fingerprint="",
        domains=names,
        regimes=tuple(PUBLISHED_TEMPERATURES),
        weight=weight,
        bias=bias,
        temperature=temperature,
        axes=np.zeros((count, weight.shape[2]), dtype=np.float32),
        importance={PUBLISHED_CRITERION: importance},
        whitelist=whitelist_pairs(
            folder.read("whitelist.json", MAX_JSON_BYTES), folder.label("whitelist.json")
        ),
        calibration=(),
        manifest={
            "format": "published",
            "domain_names": "default" if domains is None else "given",
            "probe_layers": probe_layers,
            "calibrated_layers": calibrated,
            "absent": ["fingerprint", "axes", "calibration"],
            "files": dict(sorted(folder.sha256.items())),
        },
    )
    check_artifacts(artifacts, f"published artifacts {folder.root}")
    return artifacts


def _domain_names(domains: Sequence[str] | None, count: int, folder: _Folder) -> tuple[str, ...]:
    names = PUBLISHED_DOMAINS if domains is None else tuple(domains)
    if len(names) != count:
        raise ArtifactsError(
            f"published artifacts {folder.root}: they have {count} domains and "
            f"{len(names)} names were given; name all {count} in the order of the files."
        )
    return names


def _importance(folder: _Folder) -> Array:
    """`head_importance.pt`, which is JSON text: [H][K] per layer, to [K,L,H]."""
    name = "head_importance.pt"
    label = folder.label(name)
    value = folder.mapping(name)
    layers, heads, count = (
        _size(value, key, label) for key in ("num_layers", "num_heads_per_layer", "num_domains")
    )
    table = _layer_table(value, "importance", layers, label)
    if len(table) != layers:
        raise ArtifactsError(f"{label}: expected importance of {layers} layers, got {len(table)}.")
    rows = []
    for layer in range(layers):
        entry = table[layer]
        if not isinstance(entry, list) or len(entry) != heads:
            raise ArtifactsError(f"{label}: layer {layer}: expected a list of {heads} heads.")
        for head, scores in enumerate(entry):
            where = f"{label}: layer {layer}, head {head}"
            if not isinstance(scores, list) or len(scores) != count:
                raise ArtifactsError(f"{where}: expected a list of {count} scores.")
            rows.append([_number(score, where) for score in scores])
    flat = np.array(rows, dtype=np.float32).reshape(layers, heads, count)
    return np.ascontiguousarray(flat.transpose(2, 0, 1))


def _probes(folder: _Folder, layers: int, count: int) -> tuple[Array, Array, list[int]]:
    """Probe weight [L,K,d] and bias [L,K], and the layers that have one."""
    name = f"{_PROBES}/metadata.json"
    label = folder.label(name)
    metadata = folder.mapping(name)
    indices = metadata.get("layer_indices")
    if not isinstance(indices, list) or not indices:
        raise ArtifactsError(f"{label}: expected a list 'layer_indices' that is not empty.")
    for index in indices:
        if type(index) is not int or not 0 <= index < layers:
            raise ArtifactsError(f"{label}: expected layers 0 to {layers - 1}, got {index!r:.40}.")
    if len(set(indices)) < len(indices):
        raise ArtifactsError(f"{label}: 'layer_indices' lists a layer twice.")
    if _size(metadata, "num_layers", label) not in (layers, len(indices)):
        raise ArtifactsError(
            f"{label}: num_layers is {metadata['num_layers']}, head_importance.pt has {layers}."
        )
    if _size(metadata, "num_domains", label) != count:
        raise ArtifactsError(
            f"{label}: num_domains is {metadata['num_domains']}, head_importance.pt has {count}."
        )
    probes = {layer: _probe(folder, layer, count) for layer in sorted(indices)}
    widths = sorted({weight.shape[1] for weight, _ in probes.values()})
    if len(widths) > 1:
        raise ArtifactsError(f"{label}: probes differ in hidden size: {widths}.")
    weight = np.zeros((layers, count, widths[0]), dtype=np.float32)
    bias = np.zeros((layers, count), dtype=np.float32)
    for layer, (layer_weight, layer_bias) in probes.items():
        weight[layer], bias[layer] = layer_weight, layer_bias
    return weight, bias, sorted(indices)


def _probe(folder: _Folder, layer: int, count: int) -> tuple[Array, Array]:
    """Weight [K,d] and bias [K] of one layer's linear probe."""
    name = f"{_PROBES}/probe_layer_{layer}.pt"
    label = folder.label(name)
    value = _load_torch(folder.read(name, _MAX_PROBE_BYTES), label)
    state = value.get("state_dict") if isinstance(value, dict) else None
    if not isinstance(state, dict) or set(state) != {"classifier.weight", "classifier.bias"}:
        raise ArtifactsError(
            f"{label}: expected a linear probe: a state_dict of classifier.weight and .bias."
        )
    weight = _array(state["classifier.weight"], f"{label}: classifier.weight")
    bias = _array(state["classifier.bias"], f"{label}: classifier.bias")
    if weight.ndim != 2 or weight.shape[0] != count or not weight.size or bias.shape != (count,):
        raise ArtifactsError(
            f"{label}: expected weight [{count}, hidden] and bias [{count}], "
            f"got {weight.shape} and {bias.shape}."
        )
    return weight, bias


def _load_torch(data: bytes, label: str) -> Any:
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # torch.save never compresses; a compressed archive could unpack to any size.
            if any(file.compress_type != zipfile.ZIP_STORED for file in archive.infolist()):
                raise ValueError("a compressed archive")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:  # both answer bad files with exceptions of many kinds
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ArtifactsError(f"{label}: cannot be read as weights ({reason:.120}).") from None


def _array(tensor: Any, label: str) -> Array:
    import torch

    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ArtifactsError(f"{label}: expected a tensor of floating-point numbers.")
    # A strided view of a few bytes could stand for any number of elements.
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or not tensor.is_contiguous():
        raise ArtifactsError(f"{label}: expected a dense, contiguous tensor.")
    array: Array = tensor.detach().float().numpy()
    return array


def _temperatures(folder: _Folder, layers: int) -> tuple[Array, dict[str, list[int]]]:
    """Temperatures [R,L] per regime, 1.0 where there is none, and the layers that have one."""
    name = "probe_temperatures.json"
    label = folder.label(name)
    value = folder.mapping(name)
    temperature = np.ones((len(PUBLISHED_TEMPERATURES), layers), dtype=np.float32)
    calibrated: dict[str, list[int]] = {}
    for row, (regime, key) in enumerate(PUBLISHED_TEMPERATURES.items()):
        table = _layer_table(value, key, layers, label) if key in value else {}
        for layer, entry in table.items():
            temperature[row, layer] = _number(entry, f"{label}: {key}, layer {layer}")
        calibrated[regime] = sorted(table)
    return temperature, calibrated


def _layer_table(value: Mapping[str, Any], key: str, layers: int, label: str) -> dict[int, Any]:
    """A JSON object keyed by layer, its keys as integers."""
    table = value.get(key)
    if not isinstance(table, dict):
        raise ArtifactsError(f"{label}: expected an object {key!r} keyed by layer.")
    known = {str(layer): layer for layer in range(layers)}
    for layer in table:
        if layer not in known:
            raise ArtifactsError(
                f"{label}: {key}: expected layers 0 to {layers - 1}, got {layer!r:.40}."
            )
    return {known[layer]: entry for layer, entry in table.items()}


def _size(value: Mapping[str, Any], key: str, label: str) -> int:
    size = value.get(key)
    if type(size) is not int or not 0 < size <= _MAX_SIZE:
        raise ArtifactsError(
            f"{label}: expected {key!r} to be a positive integer, got {size!r:.40}."
        )
    return size


def _number(value: Any, label: str) -> float:
    if type(value) not in (int, float) or not abs(value) < _LARGEST:
        raise ArtifactsError(f"{label}: expected a number, got {value!r:.40}.")
    return float(value)
