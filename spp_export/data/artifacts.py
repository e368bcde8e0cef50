"""Artifacts: what `spp probe` learns about a model once, and the directory it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from spp_export.artifacts_checks import check_artifacts, whitelist_pairs
from spp_export.common.errors import ArtifactsError
from spp_export.common.json_files import (
    decode_utf8,
    dump_json,
    parse_json,
    read_bytes,
    text_lines,
)
from spp_export.models.shape import ModelShape

SCHEMA_VERSION = 1
# Scores of a hundred layers of tens of thousands of channels, for many domains and criteria.
MAX_FILE_BYTES = 1 << 30
MAX_TEXT_BYTES = 64 << 20
# Of a safetensors file, whose own limit lets a library make gigabytes of names.
_MAX_HEADER_BYTES = 1 << 20
# The files whose bytes the hash covers. Moments are not among them: they can be added later.
FILES = (
    "artifacts.json",
    "calibration.jsonl",
    "importance.safetensors",
    "probes.safetensors",
    "whitelist.json",
)
_PROBE_TENSORS = ("weight", "bias", "temperature", "axes")
# What a manifest without measured figures stands for. KNOWN: a prompt is of a domain when the
# probes find that as likely as this. SHARE: a domain takes part in a scenario from this share of
# the mixture on (the published cross-domain threshold).
KNOWN, SHARE = 0.5, 0.15
DOMAIN_SHRINKAGE, SCENARIO_WEIGHT = 0.5, 0.3

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Artifacts:
    """Probes, importance and whitelist of one model, over K domains and L layers of H query heads.

    fingerprint      of the model they were made for; "" where it is not known
    domains [K]      names, in the order of every axis K
    regimes [R]      names, in the order of `temperature`
    weight [L,K,d], bias [L,K]   one-vs-rest probes on the pooled residual stream
    temperature [R,L]            divides the probes' logits
    axes [K,d]       domain axes
    importance       `head/<criterion>` [K,L,H], `channel/<criterion>` [K,L,I]
    whitelist        (layer, head) pairs that every plan keeps
    calibration      (domain, text) pairs they were made from
    manifest         where they come from: pools, counts, seeds, versions; JSON values only
    sha256           of the directory's files; "" before they are written
    """

    fingerprint: str
    domains: tuple[str, ...]
    regimes: tuple[str, ...]
    weight: Array
    bias: Array
    temperature: Array
    axes: Array
    importance: Mapping[str, Array]
    whitelist: tuple[tuple[int, int], ...]
    calibration: tuple[tuple[str, str], ...]
    manifest: Mapping[str, Any]
    sha256: str = ""

    @property
    def num_layers(self) -> int:
        """Layers of the model (L)."""
        return int(self.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream (d)."""
        return int(self.weight.shape[2])

    @property
    def query_heads(self) -> int:
        """Query heads per layer (H)."""
        return self._units("head")[0]

    @property
    def channels(self) -> int | None:
        """MLP channels per layer (I), or None where there is no channel criterion."""
        return next(iter(self._units("channel")), None)

    @property
    def probe_layers(self) -> tuple[int, ...]:
        """Layers that have a probe. Ours all have; imported artifacts may not, and a layer without
        one has zero weights, which would answer 0.5 for every domain."""
        layers = self.manifest.get("probe_layers")
        return tuple(range(self.num_layers)) if layers is None else tuple(layers)

    @property
    def regime_rule(self) -> tuple[float, float]:
        """Thresholds of the regime: how likely a known domain is, and the share that counts."""
        return (
            self._setting("regime_choice", "known", KNOWN),
            self._setting("regime_choice", "share", SHARE),
        )

    @property
    def shrinkage(self) -> float:
        """How far a diagnosed mixture is best shrunk towards all domains alike, 0 to 1."""
        return self._setting("shrinkage", "chosen", DOMAIN_SHRINKAGE)

    @property
    def scenario_weight(self) -> float:
        """Weight of a scenario's own text against the pools', 0 to 1."""
        return self._setting("scenario_weight", "chosen", SCENARIO_WEIGHT)

    def _setting(self, section: str, name: str, default: float) -> float:
        return float(self.manifest.get(section, {}).get(name, default))

    def _units(self, kind: str) -> list[int]:
        scores = self.importance.items()
        return [int(array.shape[2]) for name, array in scores if name.startswith(f"{kind}/")]


def read_artifacts(directory: str | os.PathLike[str]) -> Artifacts:
    """The artifacts in a directory, every value checked.

    Raises ArtifactsError naming the file, what was expected and what is there.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ArtifactsError(f"artifacts {root}: no such directory. Make it with 'spp probe'.")
    data = {name: _read(root / name) for name in FILES}
    header = _parse(root / "artifacts.json", data["artifacts.json"])
    _check_header(header, root)
    probes = _tensors(root / "probes.safetensors", data["probes.safetensors"])
    if set(probes) != set(_PROBE_TENSORS):
        raise ArtifactsError(
            f"artifacts {root}/probes.safetensors: expected the tensors "
            f"{', '.join(_PROBE_TENSORS)}, got {_names(probes)}."
        )
    artifacts = Artifacts(
        fingerprint=header["model"]["fingerprint"],
        domains=tuple(header["domains"]),
        regimes=tuple(header["regimes"]),
        **probes,
        importance=_tensors(root / "importance.safetensors", data["importance.safetensors"]),
        whitelist=whitelist_pairs(
            _parse(root / "whitelist.json", data["whitelist.json"]),
            f"artifacts {root}/whitelist.json",
        ),
        calibration=tuple(_calibration(root / "calibration.jsonl", data["calibration.jsonl"])),
        manifest=header["manifest"],
        sha256=_digest(data),
    )
    check_artifacts(artifacts, f"artifacts {root}")
    _check_sizes(artifacts, header["model"], root)
    return artifacts


def write_artifacts(artifacts: Artifacts, directory: str | os.PathLike[str]) -> Artifacts:
    """Write the files of `artifacts` into an empty directory; the same artifacts with `sha256` set.

    Equal artifacts give equal bytes. Raises ArtifactsError where they contradict themselves.
    """
    check_artifacts(artifacts, "artifacts")
    data = _encode(artifacts)
    for name, content in data.items():
        with open(Path(directory) / name, "xb") as file:
            file.write(content)
    return replace(artifacts, sha256=_digest(data))


def check_model(artifacts: Artifacts, fingerprint: str, shape: ModelShape) -> str | None:
    """Whether the artifacts belong to a model: ArtifactsError, naming both, if they do not.

    Imported artifacts carry no fingerprint, so that only sizes can be compared; a sentence that
    says so is returned then, and None otherwise.
    """
    remedy = "Run 'spp probe' for this model."
    if artifacts.fingerprint and artifacts.fingerprint != fingerprint:
        raise ArtifactsError(
            f"artifacts: made for the model {artifacts.fingerprint[:16]}, "
            f"this one is {fingerprint[:16]}. {remedy}"
        )
    ours = {key: size for key, size in _model_sizes(artifacts).items() if size is not None}
    theirs = {key: getattr(shape, key) for key in ours}
    if ours != theirs:
        raise ArtifactsError(
            f"artifacts: made for a model of {_sizes(ours)}; "
            f"this one has {_sizes(theirs)}. {remedy}"
        )
    if artifacts.fingerprint:
        return None
    return (
        "the artifacts do not say which model they were made for; "
        "only the numbers of layers and heads and the hidden size were compared"
    )


def _encode(artifacts: Artifacts) -> dict[str, bytes]:
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": {"fingerprint": artifacts.fingerprint, **_model_sizes(artifacts)},
        "domains": artifacts.domains,
        "regimes": artifacts.regimes,
        "manifest": artifacts.manifest,
    }
    lines = (
        json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n"
        for domain, text in artifacts.calibration
    )
    probes = {name: getattr(artifacts, name) for name in _PROBE_TENSORS}
    data = {
        "artifacts.json": dump_json(header).encode(),
        "calibration.jsonl": "".join(lines).encode(),
        "importance.safetensors": _save(artifacts.importance),
        "probes.safetensors": _save(probes),
        "whitelist.json": dump_json(artifacts.whitelist).encode(),
    }
    assert tuple(data) == FILES
    return data


def _save(arrays: Mapping[str, Array]) -> bytes:
    return save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})


def _model_sizes(artifacts: Artifacts) -> dict[str, int | None]:
    return {
        "num_layers": artifacts.num_layers,
        "query_heads": artifacts.query_heads,
        "hidden_size": artifacts.hidden_size,
        "channels": artifacts.channels,
    }


def _digest(data: Mapping[str, bytes]) -> str:
    """SHA-256 over name and SHA-256 of each file, sorted by name."""
    lines = (f"{name}\0{hashlib.sha256(data[name]).hexdigest()}\n" for name in sorted(data))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(path: Path) -> bytes:
    limit = MAX_FILE_BYTES if path.suffix == ".safetensors" else MAX_TEXT_BYTES
    return read_bytes(path, what="artifacts", max_bytes=limit, error=ArtifactsError, pipe=False)


def _parse(path: Path, data: bytes) -> Any:
    label = f"artifacts {path}"
    text = decode_utf8(data, what=label, error=ArtifactsError)
    return parse_json(text, what=label, error=ArtifactsError)


def _tensors(path: Path, data: bytes) -> dict[str, Array]:
    if (length := int.from_bytes(data[:8], "little")) > _MAX_HEADER_BYTES:
        raise ArtifactsError(
            f"artifacts {path}: is not a safetensors file of ours (its header claims {length} "
            f"bytes, at most {_MAX_HEADER_BYTES} are allowed)."
        )
    try:
        tensors = load(data)
    # The library answers an unknown dtype with a KeyError, and bad shapes with a ValueError.
    except (SafetensorError, KeyError, ValueError, TypeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:200]
        raise ArtifactsError(f"artifacts {path}: is not a safetensors file ({reason}).") from None
    return tensors


def _check_header(header: Any, root: Path) -> None:
    """Types of artifacts.json; what the values mean is checked with the tensors."""
    label = f"artifacts {root}/artifacts.json"
    version = header.get("schema_version") if isinstance(header, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ArtifactsError(
            f"{label}: expected schema_version {SCHEMA_VERSION}, got {version!r:.40}. "
            "Artifacts of the published format are converted by 'spp artifacts import'."
        )
    kinds = {"model": dict, "domains": list, "regimes": list, "manifest": dict}
    for key, kind in kinds.items():
        if not isinstance(header.get(key), kind):
            raise ArtifactsError(f"{label}: {key!r} is missing or not a JSON {kind.__name__}.")
    if unknown := set(header) - set(kinds) - {"schema_version"}:
        raise ArtifactsError(f"{label}: unknown key {_names(unknown)}.")
    fingerprint = header["model"].get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint.isprintable():
        raise ArtifactsError(f"{label}: 'model.fingerprint' is missing or no line of text.")


def _check_sizes(artifacts: Artifacts, model: Mapping[str, Any], root: Path) -> None:
    for key, found in _model_sizes(artifacts).items():
        if key not in model or type(model[key]) is not type(found) or model[key] != found:
            raise ArtifactsError(
                f"artifacts {root}: artifacts.json says {key} = {model.get(key)!r:.40}, "
                f"the tensors have {found}."
            )


def _calibration(path: Path, data: bytes) -> Iterable[tuple[str, str]]:
    text = decode_utf8(data, what=f"artifacts {path}", error=ArtifactsError)
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        where = f"artifacts {path}: line {number}"
        entry = parse_json(line, what=where, error=ArtifactsError)
        match entry:
            case {"domain": str(domain), "text": str(content)}:
                yield domain, content
            case _:
                raise ArtifactsError(
                    f"{where}: expected an object with the strings 'domain' and 'text'."
                )


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))[:300] or "none"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {size}" for key, size in sizes.items())
