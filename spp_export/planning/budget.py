"""The budget that a user sets for a plan, and the limit on the units' cost that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from spp_export.common.errors import UsageError
from spp_export.models.shape import (
    UNITS,
    LayerShape,
    ModelShape,
    Units,
    includes,
    unit_parameters,
)
from spp_export.planning.allocate.sizes import CostKind
from spp_export.planning.latency import LatencyTable

Cost = Literal["params", "kv-bytes", "latency"]
COSTS: tuple[Cost, ...] = ("params", "kv-bytes", "latency")
DEFAULT_KEEP = 0.8
DEFAULT_RHO = 0.1


@dataclass(frozen=True, slots=True)
class Budget:
    """Exactly one of five limits, and which units may go to meet it.

    units: "heads" of q, k, v and o, "channels" of gate, up and down, in experts where a model has
    them, or "both"; "experts", or "all" of these.
    cost: what `keep` and `strength` are shares of, and what units compete by: the parameters of
    those projections, the bytes of KV cache, or the latency of the blocks that hold the units.
    keep: share that may stay, in (0, 1].
    max_params: parameters of the whole slim model. max_kv_bytes: bytes of KV cache per token.
    max_latency: milliseconds of a step of the whole slim model.
    strength: eta in [0, 1]; keeps rho + (1 - rho) (1 - eta (1 - breadth)), so that it prunes more
    the higher it is, and less the more domains a scenario draws on.

    Raises UsageError for none, several, a value out of range, a limit in another currency than
    the cost, KV bytes where channels or experts may go, which have none, or latency where experts
    may, of which no table knows.
    """

    keep: float | None = None
    max_params: int | None = None
    max_kv_bytes: int | None = None
    strength: float | None = None
    rho: float = DEFAULT_RHO
    units: Units = "heads"
    cost: Cost = "params"
    max_latency: float | None = None

    def __post_init__(self) -> None:
        if len(self._limits) != 1:
            got = " and ".join(self._limits) or "none"
            raise UsageError(f"budget: expected exactly one of {', '.join(_LIMITS)}, got {got}.")
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
        self._check_cost()

    def _check_cost(self) -> None:
        if self.cost not in COSTS:
            raise UsageError(f"budget: cost must be one of {', '.join(COSTS)}, got {self.cost!r}.")
        (limit,) = self._limits
        if (limit, self.cost) not in _COSTS_OF:
            fitting = next(cost for name, cost in _COSTS_OF if name == limit)
            raise UsageError(
                f"budget: {limit} is no limit on cost {self.cost}; use cost {fitting}."
            )
        if self.max_latency is not None and not _is_positive(self.max_latency):
            raise UsageError(
                f"budget: max_latency must be a positive number, got {self.max_latency!r}."
            )
        if self.units != "heads" and (limit == "max_kv_bytes" or self.cost == "kv-bytes"):
            name = limit if limit == "max_kv_bytes" else "cost kv-bytes"
            raise UsageError(
                f"budget: {name} limits heads, and units are {self.units}; use units heads."
            )
        if self.cost == "latency" and includes(self.units, "experts"):
            raise UsageError(
                f"budget: tables of latency know no experts, and units are {self.units}; "
                "use cost params."
            )

    def limit(
        self,
        shape: ModelShape,
        breadth: float | None = None,
        latency: LatencyTable | None = None,
    ) -> Limit:
        """The limit on what units may cost.

        `breadth` in [0, 1] is needed for `strength` alone, and the table `latency` where that is
        the cost. Raises ProfileError for a table of another model.
        """
        if self.cost == "latency":
            if latency is None:
                raise UsageError("budget: cost latency needs a table. Give a profile.")
            latency.check_model(shape)
        if self.max_latency is not None and latency is not None:
            step = math.floor(Decimal(repr(float(self.max_latency))) * 1_000_000)
            fixed = latency.fixed_cost(shape, self.units)
            return Limit("latency", step - fixed, latency=latency)
        dense = unit_parameters(shape, shape.layers, self.units)
        if self.max_kv_bytes is not None:
            return Limit("kv-bytes", self.max_kv_bytes)
        if self.max_params is not None:
            return Limit("parameters", self.max_params - (shape.parameters(shape.layers) - dense))
        keep = self.keep
        if keep is None:
            keep = self.adaptive_keep(breadth)
        kind = _COST_KINDS[self.cost]
        table = latency if kind == "latency" else None
        dense = unit_cost(shape, shape.layers, self.units, kind, table)
        # In decimals: the share that was typed, not the float below it.
        return Limit(kind, math.floor(Decimal(repr(float(keep))) * dense), keep, table)

    def adaptive_keep(self, breadth: float | None) -> float:
        """Keep share that `strength` gives for a scenario of this breadth."""
        if self.strength is None or breadth is None:
            raise UsageError("budget: strength needs the breadth of a scenario. Give one, or keep.")
        _check_share("breadth", breadth, zero=True)
        return self.rho + (1 - self.rho) * (1 - self.strength * (1 - breadth))

    @property
    def _limits(self) -> dict[str, Any]:
        """The limits that are set, by name."""
        limits = ((name, getattr(self, name)) for name in _LIMITS)
        return {name: value for name, value in limits if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The request, for plan.json."""
        record = self._limits
        record |= {"rho": self.rho} if self.strength is not None else {}
        record |= {"cost": self.cost} if self.cost != "params" else {}
        return record | ({"units": self.units} if self.units != "heads" else {})


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that units may cost over all layers, and the keep share it came from, if any.

    latency: the table, where cost is time, in nanoseconds.
    """

    kind: CostKind
    cost: int
    keep: float | None = None
    latency: LatencyTable | None = None


def unit_cost(
    shape: ModelShape,
    layers: Sequence[LayerShape],
    units: Units,
    kind: CostKind,
    latency: LatencyTable | None = None,
) -> int:
    """What these layers' heads, channels or both cost."""
    if kind == "kv-bytes":
        return shape.kv_bytes_per_token(layers)
    if kind == "latency":
        assert latency is not None, "a cost in time needs a table"
        return latency.block_cost(layers, units)
    return unit_parameters(shape, layers, units)


_LIMITS = ("keep", "max_params", "max_kv_bytes", "max_latency", "strength")
_COST_KINDS: dict[Cost, CostKind] = {
    "params": "parameters",
    "kv-bytes": "kv-bytes",
    "latency": "latency",
}
# A limit, and the cost that it may be on; a limit in KV bytes needs no word for its own.
_COSTS_OF = (
    *((name, cost) for name in ("keep", "strength") for cost in COSTS),
    ("max_params", "params"),
    ("max_kv_bytes", "kv-bytes"),
    ("max_kv_bytes", "params"),
    ("max_latency", "latency"),
)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return (isinstance(value, float) or _is_int(value)) and 0 < value < math.inf  # type: ignore[operator]


def _check_share(name: str, value: object, *, zero: bool) -> None:
    number = isinstance(value, float) or _is_int(value)
    if not number or not (0 <= value <= 1 if zero else 0 < value <= 1):  # type: ignore[operator]
        interval = "[0, 1]" if zero else "(0, 1]"
        raise UsageError(f"budget: {name} must be a number in {interval}, got {value!r}.")
