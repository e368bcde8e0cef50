"""No figure from a model that computes something else: what is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import spp_export
from spp_bench.candidates import Candidate, Out
from spp_bench.cases import Cell, tokens
from spp_bench.engines.runner import Logits, Runner
from spp_export.common.errors import ParityError
from spp_export.common.manifest import MANIFEST_NAME, hash_file
from spp_export.formats.gguf.options import QUANTS

# A runner with wrong tokens, positions or weights is off by about 1; rounding by no more than this.
_ROOM = {"fp32": 1e-3, "float32": 1e-3, "float64": 1e-6}
_ROOM_OF_HALVES = 0.1
_QUANTISED = ("int8", "int4", "int8-dynamic", *QUANTS)
# They decode tokens of their own choice.
_CHOOSING = ("genai", "gguf")
_TOKENS = 16


def manifest_hash(out: Out) -> str | None:
    """SHA-256 of a directory's manifest, which lists every file; None where there is no
    manifest."""
    path = out.directory / MANIFEST_NAME
    return hash_file(path).sha256 if path.is_file() else None


def check_outs(
    outs: Sequence[Out], model: str, device: str, dtype: str | None
) -> list[dict[str, Any]]:
    """`spp verify` on every directory: files as in the manifest, logits of the masked dense model.

    Raises ParityError for the first that fails.
    """
    verified = []
    for out in outs:
        report = spp_export.verify(
            out.directory,
            model=model,
            device=device,
            dtype=None if out.form else dtype,  # graphs and files have their own
        )
        if not report.passed:
            failed = report.failures[0]
            raise ParityError(
                f"{out.name}: {failed.name}: {failed.describe()} No figures are given of a model "
                "that fails its checks."
            )
        checks = [check.to_dict() for check in report.checks]
        verified.append({"name": out.name, "manifest": manifest_hash(out), "checks": checks})
    return verified


def check_agreement(
    runners: Sequence[Runner],
    candidates: Mapping[str, Candidate],
    vocab_size: int,
    steps: int = _TOKENS,
) -> list[dict[str, Any]]:
    """The same weights must give the same logits on every engine, after prefill and `steps` of
    decoding.

    Runners are compared within each model (dense, or of the same plan) by the difference relative
    to the length of the first runner's logits; a quantised graph or file only has to pass the
    checks of its directory. Raises ParityError.
    """
    fed = tokens(Cell(1, _TOKENS), steps, vocab_size)
    first: dict[str | None, tuple[str, list[Logits]]] = {}
    distances = []
    for runner in runners:
        candidate = candidates[runner.name]
        if candidate.precision in _QUANTISED:
            continue
        logits = _logits(runner, fed.prompt, fed.continuation, candidate.engine not in _CHOOSING)
        name, reference = first.setdefault(candidate.plan_hash, (runner.name, logits))
        if name == runner.name:
            continue
        apart = max(map(distance, logits, reference))
        limit = max(rounding_room(candidate), rounding_room(candidates[name]))
        if not apart <= limit:
            raise ParityError(
                f"{runner.name}: its logits differ from those of {name} by {apart:.2g} of "
                f"their length, at most {limit:g} is rounding. One of them is not the same model."
            )
        distances.append({"name": runner.name, "as": name, "distance": apart, "limit": limit})
    return distances


def _logits(runner: Runner, prompt: Any, continuation: Any, decoding: bool) -> list[Logits]:
    """After prefill and, where the runner takes given tokens, after decoding."""
    runner.reserve(prompt.shape[1] + continuation.shape[1])
    runner.prefill(prompt)
    steps = [runner.logits()]
    if decoding:
        runner.decode(continuation)
        steps.append(runner.logits())
    runner.forget()
    return steps


def distance(logits: Logits, reference: Logits) -> float:
    """How far logits are from the reference, as a share of the reference's length (norm).

    Both less their mean, which says nothing: log-probabilities are logits, too.
    """
    logits, reference = (
        values - values.mean(axis=-1, keepdims=True) for values in (logits, reference)
    )
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


def rounding_room(candidate: Candidate) -> float:
    """The distance that rounding may come to at a candidate's precision."""
    return _ROOM.get(candidate.precision, _ROOM_OF_HALVES)


def same_files(gate: Sequence[Mapping[str, Any]], outs: Sequence[Out]) -> bool:
    """Whether an earlier run's gate saw these same directories, by their manifests; the files that
    the manifests list are checked against the disk."""
    from spp_export.common.manifest import check_manifest

    seen = {record["name"]: record["manifest"] for record in gate}
    return all(
        manifest_hash(out) is not None
        and seen.get(out.name) == manifest_hash(out)
        and not check_manifest(Path(out.directory))
        for out in outs
    )
