"""Whether a slim checkpoint is what was promised: the checks, their figures and their limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, input_device, model_inputs
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.families import Family
from spp_export.models.layerwise import logits_of_calls
from spp_export.models.shape import ModelShape
from spp_export.planning import Plan
from spp_export.slicing.projections import Projections

# Room for rounding in units of eps(dtype) x largest |logit|: above the oracle's own error; where a
# model is compared with itself on other shapes, and so other kernels; and on the same shapes, where
# no number should change at all.
_ROOM_ABOVE_ORACLE = 16.0
_ROOM_ON_OTHER_SHAPES = 64.0
_ROOM_ON_THE_SAME = 4.0
# What rounding does to the oracle, decoding can do several times: it rounds anew at every step.
_ROUNDINGS_OF_DECODING = 4.0
# Two computations of the same logits round apart: what one loses, the other may lose twice.
_ROUNDINGS_OF_PARITY = 2.0
_DECODED = 16
# Tokens of which the usual error is told, and how much further any other may be off: in some models
# rounding is amplified thousandfold at a token here and there, and two computations that are both
# right then differ there by what is chance. Something wrong is off at most tokens, or by far more.
_USUAL = 0.9
_OUTLIERS = 64.0


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Floats to four significant digits: the last bits of a measurement say nothing, and a file
    that has them would differ from run to run on another number of threads."""
    return {key: _rounded(value) for key, value in record.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return rounded(value)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    # JSON has no infinity; a check that found one says so by failing.
    return float(f"{value:.4g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Check:
    """One promise: what was found, the limit it had to keep, and whether it did."""

    name: str
    passed: bool
    found: float | None = None
    limit: float | None = None
    detail: str = ""

    def describe(self) -> str:
        """What was found against what was allowed, in one phrase."""
        figures = "" if self.found is None else f"found {self.found:.3g}, at most {self.limit:.3g}"
        return "; ".join(part for part in (figures, self.detail) if part) + "."

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, with figures rounded."""
        full = {
            "name": self.name,
            "passed": self.passed,
            "found": self.found,
            "limit": self.limit,
            "detail": self.detail or None,
        }
        return rounded({key: value for key, value in full.items() if value is not None})


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one export."""

    checks: tuple[Check, ...]
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """For verify.json and `--json`."""
        return {
            "schema_version": 1,
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            **self.context,
        }


@dataclass(frozen=True)
class Errors:
    """How far logits are off: the most of nine tokens in ten, and the most of any."""

    usual: float = 0.0
    largest: float = 0.0

    @classmethod
    def of_tokens(cls, errors: Tensor) -> Errors:
        """From each token's largest difference [T]; what is not a number is infinitely far off."""
        if not errors.numel():
            return cls()
        errors = errors.double().nan_to_num(nan=math.inf, posinf=math.inf)
        usual = errors.quantile(_USUAL, interpolation="higher")
        return cls(float(usual), float(errors.max()))

    def check(self, name: str, rounding: Errors, times: float, room: float, detail: str) -> Check:
        """Whether they are what rounding explains: `times` what it does to the oracle and `room`
        beside, and for any one token more than that."""
        limit = times * rounding.usual + room
        most = _OUTLIERS * (times * rounding.largest + room)
        passed = _holds(self.usual, limit) and _holds(self.largest, most)
        far = f"; one token {self.largest:.3g}, at most {most:.3g}" if self.largest > limit else ""
        return Check(name, passed, self.usual, limit, detail + far)


@dataclass(frozen=True)
class ReferenceLogits:
    """Logits [T,V] of the masked dense model at the real tokens of some batches.

    exact  in the reference dtype (wider than the slim model's where memory allows)
    same   in the slim model's own dtype: how far rounding alone takes the oracle
    """

    batches: tuple[TokenBatch, ...]
    exact: tuple[Tensor, ...]
    same: tuple[Tensor, ...]

    @property
    def rounding(self) -> Errors:
        """How far rounding takes the logits of the oracle in the slim model's dtype."""
        return Errors.of_tokens(_of_tokens(self.same, self.exact))


def real_logits(model: nn.Module, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
    """Logits [T,V] at the T real tokens of each batch, in the model's dtype, on the CPU."""
    calls = [model_inputs(model, batch) for batch in batches]
    for batch, logits in zip(batches, logits_of_calls(model, calls), strict=True):
        yield logits[batch.attention_mask.bool().to(logits.device)].cpu()


def reference_logits(
    dense: nn.Module,
    family: Family,
    shape: ModelShape,
    plan: Plan,
    batches: Sequence[TokenBatch],
    compensated: Projections | None,
    *,
    exact_dtype: torch.dtype = torch.float64,
) -> ReferenceLogits:
    """What the slim model must give on these batches, by the oracle in two precisions.

    The dense model is cast to `exact_dtype` on the way and back to its own dtype after.
    """
    own = next(dense.parameters()).dtype
    with masked_dense(dense, family, shape, plan, compensated):
        same = tuple(real_logits(dense, batches))
    with (
        _in_dtype(dense, exact_dtype, own),
        masked_dense(dense, family, shape, plan, compensated),
    ):
        exact = tuple(real_logits(dense, batches))
    return ReferenceLogits(tuple(batches), exact, same)


@contextmanager
def _in_dtype(model: nn.Module, dtype: torch.dtype, back: torch.dtype) -> Iterator[None]:
    # Rotary tables are buffers in fp32 whatever the weights: casting them down and up would lose
    # bits, so they are put back as they were.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.to(dtype)
        yield
    finally:
        model.to(back)
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)


def check_parity(slim: nn.Module, reference: ReferenceLogits) -> Check:
    """`err(slim) <= 2 err(masked dense, same dtype) + rounding`, both against the exact oracle."""
    own = tuple(real_logits(slim, reference.batches))
    largest = max((float(exact.abs().max()) for exact in reference.exact), default=0.0)
    between = Errors.of_tokens(_of_tokens(own, reference.same)).largest
    tokens = sum(batch.real_tokens for batch in reference.batches)
    return Errors.of_tokens(_of_tokens(own, reference.exact)).check(
        "logits parity with the masked dense model",
        reference.rounding,
        _ROUNDINGS_OF_PARITY,
        _room(slim, largest, _ROOM_ABOVE_ORACLE),
        f"max |slim - masked dense| {between:.2e} in the same dtype, {tokens} tokens, "
        f"largest |logit| {largest:.1f}",
    )


def check_causality(slim: nn.Module, batch: TokenBatch) -> Check:
    """A prefix's logits must not depend on what follows it."""
    ids = _first_row(slim, batch)
    half = max(ids.shape[1] // 2, 1)
    changed = ids.clone()
    settings: Any = slim.config
    changed[:, half:] = (ids[:, half:] + 1) % settings.get_text_config().vocab_size
    whole, other = (
        logits[:, :half]
        for logits in logits_of_calls(
            slim, [{"input_ids": row, "use_cache": False} for row in (ids, changed)]
        )
    )
    distance = _distance(whole, other)
    limit = _room(slim, float(whole.abs().max()), _ROOM_ON_THE_SAME)
    detail = f"prefix of {half} tokens, {ids.shape[1] - half} after it changed"
    return Check("prefix causality", _holds(distance, limit), distance, limit, detail)


def check_cache(slim: nn.Module, batch: TokenBatch, rounding: Errors = Errors()) -> Check:
    """Token-by-token decoding with a cache must give the logits of one uncached pass.

    The tokens are the text's own, over again where it is short, so that all steps can go through a
    model together. The two ways take other kernels. `rounding`, of `ReferenceLogits`, is what that
    can cost: models that lost much amplify it.
    """
    from transformers import DynamicCache

    ids, prompt = _decoded_ids(slim, batch)
    settings: Any = slim.config
    cache = DynamicCache(config=settings)
    steps = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    calls: list[dict[str, Any]] = [
        {"input_ids": step, "past_key_values": cache, "use_cache": True} for step in steps
    ]
    *decoded, whole = logits_of_calls(slim, [*calls, {"input_ids": ids, "use_cache": False}])
    cached = torch.stack([logits[:, -1] for logits in decoded], dim=1)
    uncached = whole[:, -_DECODED:]
    return Errors.of_tokens(_of_tokens(cached, uncached)).check(
        "cached against uncached decoding",
        rounding,
        _ROUNDINGS_OF_DECODING,
        _room(slim, float(uncached.abs().max()), _ROOM_ON_OTHER_SHAPES),
        f"{_DECODED} tokens",
    )


def cached_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Logits [1,T,V] of decoding token by token with the cache that the model itself makes."""
    ids, prompt = _decoded_ids(model, batch)
    cache, logits = None, []
    with torch.no_grad():
        for step in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def check_cached_like(
    slim: nn.Module, expected: Tensor, batch: TokenBatch, rounding: Errors = Errors()
) -> Check:
    """Token-by-token decoding must give the `cached_logits` of the masked dense model.

    For models with other mixers than attention, some of which compute a step otherwise than a whole
    text; `rounding` as in `check_cache`.
    """
    logits = cached_logits(slim, batch)
    return Errors.of_tokens(_of_tokens(logits, expected)).check(
        "cached decoding against the masked dense model",
        rounding,
        _ROUNDINGS_OF_DECODING,
        _room(slim, float(expected.abs().max()), _ROOM_ON_OTHER_SHAPES),
        f"{_DECODED} tokens",
    )


def _decoded_ids(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, int]:
    """Token ids to decode by, the text's own, over again where it is short, and how many of them
    come at once."""
    ids = _first_row(model, batch)
    prompt = max(ids.shape[1] // 2, 1)
    return ids.repeat(1, 1 + _DECODED)[:, : prompt + _DECODED - 1], prompt


def _first_row(model: nn.Module, batch: TokenBatch) -> Tensor:
    return batch.input_ids[:1, : int(batch.attention_mask[0].sum())].to(input_device(model))


def _of_tokens(some: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """Each token's largest difference [T] of logits [T,V], batch by batch."""
    apart = [
        (a.double().cpu() - b.double().cpu()).abs().amax(-1).flatten()
        for a, b in zip(some, others, strict=True)
    ]
    return torch.cat(apart) if apart else torch.zeros(0)


def _distance(a: Tensor, b: Tensor) -> float:
    difference = float((a.double().cpu() - b.double().cpu()).abs().max())
    # NaN compares false with every limit only if it stays NaN; make the failure explicit.
    return difference if difference == difference else float("inf")


def _holds(measured: float, limit: float) -> bool:
    # Where the oracle itself is not finite there is no limit to keep.
    return math.isfinite(limit) and measured <= limit


def _room(model: nn.Module, largest: float, units: float) -> float:
    dtype = next(model.parameters()).dtype
    return units * torch.finfo(dtype).eps * max(largest, 1.0)
