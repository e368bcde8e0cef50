"""What the page shows, as plain values: the pipeline fills it in, the other files here draw it.

Texts may come from files that nobody has checked; drawing escapes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spp_export.models.engines import Engine
from spp_export.planning import LayerPlan

# main: what the page is about. bound: the most that is possible. other: one of a few to compare
# with. faint: one of many.
Style = Literal["main", "bound", "other", "faint"]


@dataclass(frozen=True)
class Hint:
    """A section that has nothing to show: why, and the command that would change it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure of the headline row; `good` False marks an answer that is no."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Fact:
    """A line of a list of facts; `code` sets it in a fixed width."""

    name: str
    value: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; `text` are the columns that hold no numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Mixture:
    """Domains of the scenario with their shares, largest first, and what follows from them."""

    shares: tuple[tuple[str, float], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """A figure per query head, `values[layer][head]`, and an honest word on what it is."""

    name: str
    note: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Heads:
    """Which heads of the dense model stay.

    note: where its sizes are not stated but inferred, how. scores: None where there are none, for
    the reason `unscored`.
    """

    layers: tuple[LayerPlan, ...]
    query_heads: int
    kv_heads: int
    note: str = ""
    scores: Scores | None = None
    unscored: str = ""

    @property
    def group_size(self) -> int:
        """Query heads per KV head of the dense model."""
        return self.query_heads // self.kv_heads

    @property
    def kept(self) -> int:
        """Query heads of all layers that stay."""
        return sum(len(layer.query_heads) for layer in self.layers)

    @property
    def kept_groups(self) -> int:
        """KV heads of all layers that stay."""
        return sum(len(layer.kv_heads) for layer in self.layers)


@dataclass(frozen=True)
class Channels:
    """MLP channels kept per layer, of `dense` each."""

    kept: tuple[int, ...]
    dense: int


@dataclass(frozen=True)
class Saving:
    """One size before and after."""

    name: str
    dense: float
    slim: float
    is_bytes: bool = False


@dataclass(frozen=True)
class Savings:
    """Sizes before and after, the bounds on speed that follow, and remarks."""

    sizes: tuple[Saving, ...]
    bounds: Table | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One check of verify.json; `found` and `limit` where it has them."""

    name: str
    passed: bool
    found: float | None = None
    limit: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Checks:
    """A report of verify.json."""

    passed: bool
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A place on a chart; `low` and `high` bound `y` where its spread is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line of a chart; series of one `hue` have one colour, and None is grey."""

    label: str
    points: tuple[Point, ...]
    style: Style = "main"
    hue: int | None = 0


@dataclass(frozen=True)
class Chart:
    """Lines over an axis.

    level: a horizontal line that means "as the dense model", on an axis of ratios. mark: a place
    on the x axis and its name. cut: no more of the y axis than this is drawn. unit, x_unit: what
    follows a value. dashed: what the lines of style `bound` are, for the legend.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    level: float | None = None
    mark: tuple[float, str] | None = None
    cut: float | None = None
    unit: str = ""
    x_unit: str = ""
    dashed: str = ""


@dataclass(frozen=True)
class Spread:
    """A measured ratio with its spread, beside the most it could be."""

    label: str
    value: float
    low: float
    high: float
    bound: float
    note: str = ""


@dataclass(frozen=True)
class Quality:
    """Figures on held-out text, and curves of an evaluation: those of the plan's own units and
    compensation first, then the others."""

    figures: tuple[Fact, ...] = ()
    charts: tuple[Chart, ...] = ()
    more: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    hint: Hint | None = None


@dataclass(frozen=True)
class Benchmark:
    """Measured speed and memory beside their bounds: as `spreads` where there is one context,
    else as charts over it."""

    spreads: tuple[tuple[str, tuple[Spread, ...]], ...]
    charts: tuple[Chart, ...]
    tables: tuple[tuple[str, Table], ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The page. A part that is None has no section.

    files: name, bytes and SHA-256, as the manifest lists them.
    """

    title: str
    kind: str
    summary: str
    heads: Heads
    savings: Savings | Hint
    generator: str
    tiles: tuple[Tile, ...] = ()
    mixture: Mixture | Hint | None = None
    channels: Channels | None = None
    checks: Checks | Hint | None = None
    quality: Quality | Hint | None = None
    benchmark: Benchmark | Hint | None = None
    engines: tuple[Engine, ...] = ()
    provenance: tuple[Fact, ...] = ()
    versions: Mapping[str, str] | None = None
    files: Table | None = None
