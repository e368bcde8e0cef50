"""Artifacts: what `spp probe` learns about a model once, and the directory it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from spp_export.common.documents import Document, Rows, printable, validated
from spp_export.common.errors import ArtifactsError, UsageError
from spp_export.common.json_files import (
    decode_utf8,
    dump_json,
    parse_json,
    read_bytes,
    shown,
    text_lines,
)
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.hub import DEMO
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
# Beside them, all or none: artifacts of before do not say what text is familiar.
_FAMILIAR_KEYS = {name: f"familiar_{name}" for name in ("means", "basis", "scales")}
# Of all dialogues, one after the other; artifacts of before, and of models that run from disk, have
# none.
_GRADIENTS = "gradients"
# What a manifest without measured figures stands for. KNOWN: a prompt is of a domain when the
# probes find that as likely as this. SHARE: a domain takes part in a scenario from this share of
# the mixture on (the published cross-domain threshold).
KNOWN, SHARE = 0.5, 0.15
DOMAIN_SHRINKAGE, SCENARIO_WEIGHT = 0.5, 0.3

# Larger ones would leave the range of float32 once they are squared and summed.
_LARGEST = 1e15
_SMALLEST_TEMPERATURE = 1e-6
_CRITERION = re.compile(r"(head|channel)/[a-z0-9][a-z0-9_-]*")

Array = np.ndarray[Any, np.dtype[np.float32]]
HalfArray = np.ndarray[Any, np.dtype[np.float16]]


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError(f"is {shown(text)}, expected text that is not blank")
    return printable(text)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"holds {', '.join(names):.300}, expected distinct names")
    return names


_Name = Annotated[str, Field(max_length=80), AfterValidator(_name)]
_Names = Annotated[Rows[_Name], Field(min_length=1, max_length=256), AfterValidator(_distinct)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_OTHERS_TOO = ConfigDict(extra="ignore")


class _RegimeChoice(Document):
    model_config = _OTHERS_TOO
    known: _Share = KNOWN
    share: _Share = SHARE


class _Shrinkage(Document):
    model_config = _OTHERS_TOO
    chosen: _Share = DOMAIN_SHRINKAGE


class _ScenarioWeight(Document):
    model_config = _OTHERS_TOO
    chosen: _Share = SCENARIO_WEIGHT


class Familiarity(Document):
    """Where text is familiar, as of `Artifacts.familiarity`."""

    model_config = _OTHERS_TOO
    layers: Rows[int]
    centre: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    # Artifacts of before judge short text as long text.
    growth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    length: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class _Manifest(Document):
    """What is read of `Artifacts.manifest` in order to plan."""

    model_config = _OTHERS_TOO
    probe_layers: Rows[int] | None = None
    regime_choice: _RegimeChoice = _RegimeChoice()
    shrinkage: _Shrinkage = _Shrinkage()
    scenario_weight: _ScenarioWeight = _ScenarioWeight()
    familiarity: Familiarity | None = None


class _Contents(Document):
    domains: _Names
    regimes: _Names
    manifest: _Manifest


class _ModelDocument(Document):
    fingerprint: Annotated[str, AfterValidator(printable)]
    num_layers: int
    query_heads: int
    hidden_size: int
    channels: int | None


class ArtifactsDocument(_Contents):
    """artifacts.json; what its values mean is checked with the tensors."""

    version = (
        SCHEMA_VERSION,
        "Artifacts of the published format are converted by 'spp artifacts import'.",
    )

    schema_version: int
    model: _ModelDocument


class _CalibrationText(Document):
    model_config = _OTHERS_TOO
    domain: str
    text: str


class _Dialogue(Document):
    model_config = _OTHERS_TOO
    domain: str
    tokens: Annotated[Rows[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    answer: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt of a domain's pool and the model's answer, as the token ids that the model reads and
    writes, of which the last `answer` are its own.

    gradients: how much the loss feels a change at each token [T,L,2], as of `gradient_lengths`, in
    half precision; None where that is not known.
    """

    domain: str
    tokens: tuple[int, ...]
    answer: int
    gradients: HalfArray | None = field(default=None, compare=False, repr=False)


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
    dialogues        some of these texts as prompts, with the model's own answers
    manifest         where they come from: pools, counts, seeds, versions; JSON values only
    sha256           of the directory's files; "" before they are written
    familiar         what text they know, at the P layers of the manifest's `familiarity`: `means`
                     [P,K,d], `basis` [P,r,d], `scales` [P,r+1]; empty where they do not say
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
    familiar: Mapping[str, Array] = field(default_factory=dict)
    dialogues: tuple[Dialogue, ...] = ()

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
        layers = self._settings.probe_layers
        return tuple(range(self.num_layers)) if layers is None else layers

    @property
    def regime_rule(self) -> tuple[float, float]:
        """Thresholds of the regime: how likely a known domain is, and the share that counts."""
        rule = self._settings.regime_choice
        return rule.known, rule.share

    @property
    def familiarity(self) -> Familiarity | None:
        """Layers of `familiar`, and the distances of validation text from it; None where the
        artifacts do not say what text they know."""
        return self._settings.familiarity

    @property
    def shrinkage(self) -> float:
        """How far a diagnosed mixture is best shrunk towards all domains alike, 0 to 1."""
        return self._settings.shrinkage.chosen

    @property
    def scenario_weight(self) -> float:
        """Weight of a scenario's own text against the pools', 0 to 1."""
        return self._settings.scenario_weight.chosen

    @property
    def _settings(self) -> _Manifest:
        return _Manifest.model_validate(dict(self.manifest))

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
    label = f"artifacts {root}/artifacts.json"
    value = parse_json(data["artifacts.json"], what=label, error=ArtifactsError)
    header = validated(ArtifactsDocument, value, what=label, error=ArtifactsError)
    probes = _tensors(root / "probes.safetensors", data["probes.safetensors"])
    familiar = {name: probes.pop(key) for name, key in _FAMILIAR_KEYS.items() if key in probes}
    gradients = probes.pop(_GRADIENTS, None)
    if set(probes) != set(_PROBE_TENSORS) or len(familiar) not in (0, len(_FAMILIAR_KEYS)):
        raise ArtifactsError(
            f"artifacts {root}/probes.safetensors: expected the tensors "
            f"{', '.join(_PROBE_TENSORS)}, got {_names({**probes, **familiar})}."
        )
    calibration, dialogues = _calibration(root / "calibration.jsonl", data["calibration.jsonl"])
    if gradients is not None:
        dialogues = _told(dialogues, gradients, f"artifacts {root}/probes.safetensors")
    artifacts = Artifacts(
        fingerprint=header.model.fingerprint,
        domains=header.domains,
        regimes=header.regimes,
        **probes,
        importance=_tensors(root / "importance.safetensors", data["importance.safetensors"]),
        whitelist=whitelist_pairs(data["whitelist.json"], f"artifacts {root}/whitelist.json"),
        calibration=calibration,
        manifest=value["manifest"],
        sha256=_digest(data),
        familiar=familiar,
        dialogues=dialogues,
    )
    check_artifacts(artifacts, f"artifacts {root}")
    for key, size in _model_sizes(artifacts).items():
        if (stated := getattr(header.model, key)) != size:
            raise ArtifactsError(f"{label} says {key} = {stated}, the tensors have {size}.")
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
    highest = max((max(one.tokens) for one in artifacts.dialogues), default=0)
    if highest >= shape.vocab_size:
        raise ArtifactsError(
            f"artifacts: hold the token {highest}, and this model has {shape.vocab_size}. {remedy}"
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
    entries: list[dict[str, Any]] = [
        {"domain": domain, "text": text} for domain, text in artifacts.calibration
    ]
    entries += (
        {"domain": one.domain, "tokens": one.tokens, "answer": one.answer}
        for one in artifacts.dialogues
    )
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    probes = {name: getattr(artifacts, name) for name in _PROBE_TENSORS}
    probes |= {_FAMILIAR_KEYS[name]: array for name, array in artifacts.familiar.items()}
    known = [one.gradients for one in artifacts.dialogues if one.gradients is not None]
    if known and len(known) == len(artifacts.dialogues):
        probes[_GRADIENTS] = np.concatenate(known)
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


def _calibration(
    path: Path, data: bytes
) -> tuple[tuple[tuple[str, str], ...], tuple[Dialogue, ...]]:
    """Texts by domain, and dialogues, of which every line is one."""
    texts, dialogues = [], []
    text = decode_utf8(data, what=f"artifacts {path}", error=ArtifactsError)
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        where = f"artifacts {path}: line {number}"
        entry = parse_json(line, what=where, error=ArtifactsError)
        if isinstance(entry, dict) and "tokens" in entry:
            spoken = validated(_Dialogue, entry, what=where, error=ArtifactsError)
            dialogues.append(Dialogue(spoken.domain, spoken.tokens, spoken.answer))
        else:
            document = validated(_CalibrationText, entry, what=where, error=ArtifactsError)
            texts.append((document.domain, document.text))
    return tuple(texts), tuple(dialogues)


def _told(
    dialogues: Sequence[Dialogue], gradients: np.ndarray[Any, np.dtype[Any]], label: str
) -> tuple[Dialogue, ...]:
    """The dialogues with the gradients of their tokens, which lie one after the other."""
    ends = np.cumsum([len(one.tokens) for one in dialogues])
    tokens = int(ends[-1]) if len(ends) else 0
    if gradients.dtype != np.float16 or gradients.ndim != 3 or len(gradients) != tokens:
        raise ArtifactsError(
            f"{label}: {_GRADIENTS}: expected float16 [{tokens}, layers, 2], got "
            f"{gradients.dtype} {list(gradients.shape)}."
        )
    parts = np.split(gradients, ends[:-1])
    return tuple(replace(one, gradients=part) for one, part in zip(dialogues, parts, strict=True))


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))[:300] or "none"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {size}" for key, size in sizes.items())


def bundled_artifacts() -> Path:
    """The demo model's artifacts, shipped in the package."""
    return Path(__file__).parent / "assets" / "smollm2-135m-instruct"


def open_artifacts(
    artifacts: str | os.PathLike[str] | None, model: str, source: Checkpoint
) -> Artifacts:
    """Artifacts for a model: the given directory, or the shipped ones for the demo model."""
    if artifacts is None and model != DEMO:
        raise UsageError(
            "--artifacts is missing: only the demo model's ship with spp. "
            f"Make them once with 'spp probe --model {model} --pools DIR -o ARTIFACTS'."
        )
    opened = read_artifacts(Path(artifacts) if artifacts is not None else bundled_artifacts())
    check_model(opened, source.fingerprint, source.shape)
    return opened


def check_artifacts(artifacts: Artifacts, label: str) -> None:
    """Raise ArtifactsError unless everything in the record agrees."""
    contents = {name: getattr(artifacts, name) for name in ("domains", "regimes", "manifest")}
    settings = validated(_Contents, contents, what=label, error=ArtifactsError).manifest
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
    _check_familiar(artifacts, label)
    _check_importance(artifacts.importance, count, layers, label)
    _check_whitelist(artifacts, label)
    if settings.probe_layers is not None:
        _check_layers(settings.probe_layers, layers, f"{label}: manifest.probe_layers")
    domains = [domain for domain, _ in artifacts.calibration]
    domains += [dialogue.domain for dialogue in artifacts.dialogues]
    for number, domain in enumerate(domains, start=1):
        if domain not in artifacts.domains:
            raise ArtifactsError(
                f"{label}: calibration text {number} is of the domain {domain!r:.60}, "
                f"known are {', '.join(artifacts.domains):.300}."
            )
    for number, dialogue in enumerate(artifacts.dialogues, start=1):
        if dialogue.answer > len(dialogue.tokens):
            raise ArtifactsError(
                f"{label}: dialogue {number} has an answer of {dialogue.answer} tokens and "
                f"{len(dialogue.tokens)} tokens in all."
            )
        if dialogue.gradients is not None:
            _check_gradients(dialogue.gradients, len(dialogue.tokens), layers, label)


def _check_gradients(gradients: HalfArray, tokens: int, layers: int, label: str) -> None:
    if gradients.shape != (tokens, layers, 2):
        raise ArtifactsError(
            f"{label}: {_GRADIENTS}: expected the shape {(tokens, layers, 2)} of a dialogue, got "
            f"{gradients.shape}."
        )
    if not (gradients >= 0).all() or not np.isfinite(gradients).all():
        raise ArtifactsError(
            f"{label}: {_GRADIENTS}: holds a length that is negative or not finite."
        )


def _check_familiar(artifacts: Artifacts, label: str) -> None:
    familiar, known = artifacts.familiar, artifacts.familiarity
    if not familiar and known is None:
        return
    places = known.layers if known else ()
    if set(familiar) != set(_FAMILIAR_KEYS) or not places or familiar["basis"].ndim != 3:
        raise ArtifactsError(
            f"{label}: expected the tensors {', '.join(_FAMILIAR_KEYS.values())} with "
            "manifest.familiarity, or neither."
        )
    _check_layers(places, artifacts.num_layers, f"{label}: manifest.familiarity.layers")
    hidden, directions = artifacts.hidden_size, familiar["basis"].shape[1]
    count = len(artifacts.domains)
    for name, shape in (
        ("means", (len(places), count, hidden)),
        ("basis", (len(places), directions, hidden)),
        ("scales", (len(places), directions + 1)),
    ):
        _check_array(familiar[name], shape, f"{label}: {_FAMILIAR_KEYS[name]}")
    if not (familiar["scales"] >= _SMALLEST_TEMPERATURE).all():
        raise ArtifactsError(f"{label}: {_FAMILIAR_KEYS['scales']}: expected values above 0.")


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


def _check_layers(probed: tuple[int, ...], layers: int, label: str) -> None:
    inside = all(0 <= layer < layers for layer in probed)
    if not probed or not inside or list(probed) != sorted(set(probed)):
        first = ", ".join(shown(layer) for layer in probed[:12])
        raise ArtifactsError(
            f"{label}: expected ascending layers below {layers}, got {first or 'none'}."
        )


def whitelist_pairs(data: bytes, label: str) -> tuple[tuple[int, int], ...]:
    """`[[layer, head], ...]` of a whitelist.json as pairs; ArtifactsError for anything else."""
    value = parse_json(data, what=label, error=ArtifactsError)
    pairs: list[tuple[int, int]] = []
    for pair in value if isinstance(value, list) else [value]:
        # type(), since JSON's true is an int to isinstance
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int]:
            raise ArtifactsError(f"{label}: expected a list of [layer, head], got {pair!r:.60}.")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
