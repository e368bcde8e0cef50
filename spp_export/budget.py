"""What the user asked the plan to stay within, and the limit on the units' cost that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from spp_export.allocate import CostKind
from spp_export.errors import UsageError
from spp_export.shape import LayerShape, ModelShape

Units = Literal["heads", "channels", "both"]
UNITS: tuple[Units, ...] = ("heads", "channels", "both")
DEFAULT_KEEP = 0.8
DEFAULT_RHO = 0.1


@dataclass(frozen=True, slots=True)
class Budget:
    """Exactly one of four limits, and which units may go to meet it.

    units: "heads" of q, k, v and o, "channels" of gate, up and down, or "both".
    keep: share of the parameters of those projections that may stay, in (0, 1].
    max_params: parameters of the whole slim model. max_kv_bytes: bytes of KV cache per token.
    strength: eta in [0, 1]; keeps rho + (1 - rho) (1 - eta (1 - breadth)), so that it prunes more
    the higher it is, and less the more domains a scenario draws on.

    Raises UsageError for none, several, a value out of range, or a limit on KV bytes where
    channels may go, which have none.
    """

    keep: float | None = None
    max_params: int | None = None
    max_kv_bytes: int | None = None
    strength: float | None = None
    rho: float = DEFAULT_RHO
    units: Units = "heads"

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UsageError(f"budget: expected exactly one of {', '.join(_KINDS)}, got {got}.")
        if self.keep is not None:
            _check_share("keep", self.keep, zero=False)
        if self.strength is not None:
            _check_share("strength", self.strength, zero=True)
        _check_share("rho", self.rho, zero=True)
        for name, count in (("max_params", self.max_params), ("max_kv_bytes", self.max_kv_bytes)):
            if count is not None and (not _is_int(count) or count < 1):
                raise UsageError(f"budget: {name} must be a positive integer, got {count!r}.")
        if self.units not in UNITS:
            raise UsageError(
                f"budget: units must be one of {', '.join(UNITS)}, got {self.units!r}."
            )
        if self.max_kv_bytes is not None and self.units != "heads":
            raise UsageError(
                f"budget: max_kv_bytes limits heads, and units are {self.units}; use units heads."
            )

    def limit(self, shape: ModelShape, breadth: float | None = None) -> Limit:
        """The limit on what units may cost; `breadth` in [0, 1] is needed for `strength` alone."""
        dense = unit_parameters(shape, shape.layers, self.units)
        if self.max_kv_bytes is not None:
            return Limit("kv-bytes", self.max_kv_bytes)
        if self.max_params is not None:
            return Limit("parameters", self.max_params - (shape.parameters(shape.layers) - dense))
        keep = self.keep
        if keep is None:
            keep = self.adaptive_keep(breadth)
        # In decimals: the share that was typed, not the float below it.
        return Limit("parameters", math.floor(Decimal(repr(float(keep))) * dense), keep)

    def adaptive_keep(self, breadth: float | None) -> float:
        """Keep share that `strength` gives for a scenario of this breadth."""
        if self.strength is None or breadth is None:
            raise UsageError("budget: strength needs the breadth of a scenario. Give one, or keep.")
        _check_share("breadth", breadth, zero=True)
        return self.rho + (1 - self.rho) * (1 - self.strength * (1 - breadth))

    def as_json(self) -> dict[str, Any]:
        """What was asked, for plan.json."""
        asked = {name: getattr(self, name) for name in _KINDS if getattr(self, name) is not None}
        asked |= {"rho": self.rho} if self.strength is not None else {}
        return asked | ({"units": self.units} if self.units != "heads" else {})


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that units may cost over all layers, and the keep share it came from, if any."""

    kind: CostKind
    cost: int
    keep: float | None = None


def unit_parameters(shape: ModelShape, layers: Sequence[LayerShape], units: Units) -> int:
    """Parameters of these layers that belong to heads, to channels or to both."""
    heads = shape.head_parameters(layers) if units != "channels" else 0
    channels = sum(layer.channels for layer in layers) if units != "heads" else 0
    return heads + channels * shape.channel_parameters


_KINDS = ("keep", "max_params", "max_kv_bytes", "strength")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_share(name: str, value: object, *, zero: bool) -> None:
    number = isinstance(value, float) or _is_int(value)
    if not number or not (0 <= value <= 1 if zero else 0 < value <= 1):  # type: ignore[operator]
        interval = "[0, 1]" if zero else "(0, 1]"
        raise UsageError(f"budget: {name} must be a number in {interval}, got {value!r}.")
