"""Latency tables: `spp bench --profile`.

Times an attention block (norm, q, k, v, rotary, attention over the cache, o_proj, residual) of
every regular shape, an MLP block (norm, gate, up, down, residual) of a grid of widths, and the
rest of a step (embedding, final norm, logits), in turns. The first rounds are thrown away.
`spp plan --cost latency` interpolates between the widths. The file's format is in
spp_export/planning/latency.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_bench import provenance
from spp_bench.cases import check_counts, check_device
from spp_bench.clocks import Clock, cold_clock_for, no_collection
from spp_bench.report import Panel
from spp_bench.results import write_document
from spp_bench.shapes.shapes import published
from spp_bench.threads import torch_threads
from spp_export.common.errors import UsageError
from spp_export.common.progress import progress
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import Family
from spp_export.models.hub import locate_model
from spp_export.models.shape import ModelShape, channel_widths
from spp_export.planning import check_plan_target
from spp_export.planning.latency import PHASES, SCHEMA_VERSION, SIZES, Phase, read_latency_table

if TYPE_CHECKING:
    from spp_bench.blocks import Pass, PassKind

# The multiples of the width multiple are too many to measure; the rest is interpolated.
MOST_WIDTHS = 13
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure. `threads` None means every physical core; `dtype` None means float32 on the
    CPU and the stored dtype elsewhere; `rounds` counts the timed rounds."""

    phase: str = "decode"
    batch: int = 1
    context: int = 128
    width_multiple: int = 64
    rounds: int = 31
    threads: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0

    def check(self) -> Phase:
        """The phase. UsageError for an option that makes no sense."""
        counts = {"--batch": self.batch, "--context": self.context, "--rounds": self.rounds}
        counts["--width-multiple"] = self.width_multiple
        check_counts({**counts, "--threads": self.threads})
        check_device(self.device, self.dtype)
        for phase in PHASES:
            if self.phase == phase:
                return phase
        raise UsageError(f"--phase {self.phase}: expected {' or '.join(PHASES)}.")


@dataclass(frozen=True)
class Target:
    """The model whose blocks are measured: its parsed config.json, and what follows from it."""

    name: str
    config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    dtype: str

    @classmethod
    def of_model(cls, model: str) -> Target:
        """A model on disk, or one that can be fetched; its weights are not read."""
        location = locate_model(model)
        source = open_source(location.path, location.name)
        return cls(source.name, source.config, source.family, source.shape, source.dtype_name)

    @classmethod
    def of_shape(cls, name: str) -> Target:
        """A published configuration."""
        record = published(name)
        return cls(record.name, record.config, record.family, record.shape, "bfloat16")


def profile(
    target: Target,
    output: Path,
    *,
    request: ProfileRequest | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure the blocks of a model, and write the table. Returns the document."""
    request = request or ProfileRequest()
    phase = request.check()
    check_plan_target(output, force)
    _check_windows(target, request.context)
    dtype = request.dtype or ("float32" if request.device == "cpu" else target.dtype)
    threads = request.threads or provenance.physical_cores()
    with torch_threads(threads):
        document = {
            "schema_version": SCHEMA_VERSION,
            "model": {"name": target.name} | {name: getattr(target.shape, name) for name in SIZES},
            "phase": phase,
            **{"batch": request.batch, "context": request.context},
            **{"device": request.device, "dtype": dtype},
            "machine": provenance.machine(request.device),
            "versions": provenance.versions(),
            "git": provenance.revision(),
            **_measure(target, request, phase, dtype, threads),
        }
    write_document(document, output)
    read_latency_table(output)
    return document


def grid(shape: ModelShape, multiple: int) -> list[int]:
    """Widths to measure: the narrowest, the full one, and evenly spread ones between."""
    widths = channel_widths(shape.channels, multiple)
    count = min(MOST_WIDTHS, len(widths))
    at = np.unique(np.linspace(0, len(widths) - 1, count).round().astype(int))
    return [widths[index] for index in at]


def shapes(shape: ModelShape) -> list[tuple[int, int]]:
    """Query and KV heads of every regular layer."""
    return [
        (groups * size, groups)
        for groups in range(1, shape.kv_heads + 1)
        for size in range(1, shape.group_size + 1)
    ]


def _check_windows(target: Target, context: int) -> None:
    from spp_export.formats.settings import stock_settings

    settings = stock_settings(target.config, target.family, target.shape, Path(target.name))
    window = min((size for size in settings.windows if size is not None), default=None)
    if window is not None and context >= window:
        raise UsageError(
            f"--context {context}: attention of {target.name} sees {window} tokens. Ask for fewer "
            "than these."
        )


def _measure(
    target: Target,
    request: ProfileRequest,
    phase: Phase,
    dtype: str,
    threads: int,
) -> dict[str, Any]:
    import torch

    from spp_bench.blocks import Setting, make_passes

    setting = Setting(phase, request.batch, request.context, request.device, dtype)
    shape = target.shape
    sizes = (shapes(shape), grid(shape, request.width_multiple))
    torch.manual_seed(request.seed)
    with progress("making blocks", None):
        passes = make_passes(target.config, target.family, shape, *sizes, setting)
    with progress("timing", float(request.rounds + WARM_UP_ROUNDS)) as advance_to:
        clock = cold_clock_for(request.device)
        samples = in_turns(passes, request.rounds, clock, request.seed, advance_to)
    measured = {kind: _times(seconds) for kind, seconds in samples.items()}
    return {
        "options": {
            "threads": threads,
            "rounds": request.rounds,
            "samples": min(map(len, samples.values())),
            "seed": request.seed,
            "run": "CUDA graph, cache in place" if setting.captured else "eager, growing cache",
        },
        "attention": [
            {"query_heads": query, "kv_heads": groups, **measured["attention", query, groups]}
            for query, groups in sizes[0]
        ],
        "mlp": [{"channels": width, **measured["mlp", width]} for width in sizes[1]],
        "rest": measured["rest",],
    }


def in_turns(
    passes: Sequence[Pass],
    rounds: int,
    clock: Clock,
    seed: int = 0,
    advance_to: Callable[[float], None] = lambda _: None,
) -> dict[PassKind, list[float]]:
    """Seconds of a block of every kind, in every pass that counts.

    Every round has a random order of its own. Otherwise the same pass would always find what the
    same other one left in the caches.
    """
    random = np.random.default_rng(seed)
    times: dict[PassKind, list[float]] = {entry.kind: [] for entry in passes}
    with no_collection():
        for turn in range(-WARM_UP_ROUNDS, rounds):
            for entry in [passes[index] for index in random.permutation(len(passes))]:
                seconds = clock(entry.run) / entry.count
                if turn >= 0:
                    times[entry.kind].append(seconds)
            advance_to(turn + WARM_UP_ROUNDS + 1.0)
    return times


def _times(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(samples, [0.2, 0.5, 0.8])
    named = {"seconds": median, "p20": low, "p80": high}
    return {name: float(f"{value:.6g}") for name, value in named.items()}


def panels(document: Mapping[str, Any]) -> Iterator[Panel]:
    """What was measured, as tables."""
    model = document["model"]
    yield Panel(
        f"attention blocks, {document['phase']}, batch {document['batch']}, context "
        f"{document['context']}",
        ("query heads", "KV heads", *_HEADS),
        tuple(
            (str(row["query_heads"]), str(row["kv_heads"]), *_cells(row, document["attention"][-1]))
            for row in document["attention"]
        ),
        text=frozenset(),
    )
    yield Panel(
        "MLP blocks",
        ("channels", *_HEADS),
        tuple((str(row["channels"]), *_cells(row, document["mlp"][-1])) for row in document["mlp"]),
        text=frozenset(),
    )
    blocks = document["attention"][-1]["seconds"] + document["mlp"][-1]["seconds"]
    rest = document["rest"]
    whole = model["num_layers"] * blocks + rest["seconds"]
    yield Panel(
        "dense step by the table",
        ("part", "us", "share"),
        (
            (
                f"{model['num_layers']} layers",
                f"{model['num_layers'] * blocks * 1e6:.1f}",
                f"{1 - rest['seconds'] / whole:.0%}",
            ),
            ("embedding, logits", f"{rest['seconds'] * 1e6:.1f}", f"{rest['seconds'] / whole:.0%}"),
        ),
    )


_HEADS = ("us", "p20", "p80", "of dense")


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[str, ...]:
    times = (f"{row[name] * 1e6:.1f}" for name in ("seconds", "p20", "p80"))
    return (*times, f"{row['seconds'] / dense['seconds']:.3f}")


def title(document: Mapping[str, Any]) -> str:
    """The model and the machine, in one line."""
    machine, options = document["machine"], document["options"]
    where = machine.get("gpu") or f"{machine['cpu']}, {options['threads']} threads"
    return f"{document['model']['name']} on {where}, {document['dtype']}, {options['run']}"
