"""What a run found, as tables of text, for any program that draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spp_bench.measure import Phase

NO_GAIN = "no gain possible here"
TOO_FEW = "too few rounds to tell"
_HEADS: Mapping[Phase, tuple[str, ...]] = {
    "decode": ("tok/s", "ms (p20-p80)", "speed-up", "bound", "efficiency", "GB/s", "x torch"),
    "prefill": ("tok/s", "ms (p20-p80)", "speed-up", "bound", "efficiency", "Gop/s", "x torch"),
}


@dataclass(frozen=True)
class Panel:
    """A titled table. `wrong` lists rows, from 0, that cannot be right; `text` lists columns of
    words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wrong: frozenset[int] = frozenset()
    text: frozenset[int] = frozenset({0})


def panels(document: Mapping[str, Any]) -> Iterator[Panel]:
    """Decode and prefill of every cell, then memory, then published claims."""
    for cell in document["cells"]:
        for phase, head in _HEADS.items():
            timed = [row for row in cell["rows"] if phase in row]
            if not timed:
                continue
            rows = [_row(row["name"], row[phase], phase) for row in timed]
            wrong = {
                index
                for index, row in enumerate(timed)
                if row[phase].get("speedup", {}).get("above_bound")
            }
            title = f"{phase}, batch {cell['batch']}, context {cell['context']}"
            yield Panel(title, ("model", *head), tuple(rows), frozenset(wrong))
    if document["memory"]:
        yield _memory(document)
    if document.get("claims"):
        yield _claims(document["claims"])


def _row(name: str, record: Mapping[str, Any], phase: Phase) -> tuple[str, ...]:
    rate = record["bytes_per_second" if phase == "decode" else "operations_per_second"]
    share = record["of_bandwidth" if phase == "decode" else "of_rate"]
    times = f"{record['median_ms']:.1f} ({record['p20_ms']:.1f}-{record['p80_ms']:.1f})"
    over = record.get("over_dense_torch")
    return (
        name,
        f"{record['tokens_per_second']:.1f}",
        times,
        *_gain(record.get("speedup")),
        f"{rate / 1e9:.1f} ({share:.0%})",
        "" if over is None else f"{over:.2f}",
    )


def _gain(over: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Speed-up, bound, and the share of the possible gain that was reached."""
    if over is None:
        return "", "", ""
    if over["above_bound"]:
        verdict = "impossible"
    elif over["low"] is None and over["median"] > over["ceiling"]:
        verdict = TOO_FEW
    elif over["efficiency"] is None:
        verdict = NO_GAIN
    else:
        verdict = f"{over['efficiency']:.0%}"
    return f"{over['median']:.3f}", f"{over['bound']:.3f}", verdict


def _memory(document: Mapping[str, Any]) -> Panel:
    """Weights and cache as measured, and what the process held beyond what it held before
    loading."""
    rows: list[tuple[str, ...]] = []
    wrong = set()
    for record in document["memory"]:
        for cell in record["cells"]:
            if record["problems"]:
                wrong.add(len(rows))
            rows.append(
                (
                    record["name"],
                    str(cell["batch"]),
                    str(cell["context"]),
                    _megabytes(record["weight_bytes"]),
                    _megabytes(record["predicted_weight_bytes"]),
                    _megabytes(cell["kv_bytes"]),
                    _megabytes(cell["predicted_kv_bytes"]),
                    _megabytes(cell["peak_bytes"] - record["before_bytes"]),
                )
            )
    head = ("model", "batch", "context", "weights", "predicted", "KV", "predicted", "peak")
    title = "memory in MB, a fresh process each"
    return Panel(title, head, tuple(rows), frozenset(wrong))


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _claims(rows: Sequence[Mapping[str, Any]]) -> Panel:
    head = ("claim", "published", "measured", "bound", "of what")
    return Panel(
        "published claims, and what is measured under a fixed output length",
        head,
        tuple(
            (
                row["claim"],
                _range(row["published"]),
                _range(row["measured"]),
                _range(row["bound"] or ()),
                row["what"],
            )
            for row in rows
        ),
        text=frozenset({0, len(head) - 1}),
    )


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.4g}" for value in values))


def summary(document: Mapping[str, Any]) -> str:
    """The machine and the device's own rates, in one line."""
    machine, rates = document["machine"], document["rates"]
    device = machine.get("gpu") or f"{machine['cpu']}, {document['options']['threads']} threads"
    return (
        f"{document['model']['name']} on {device}, {document['options']['dtype']}: "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{rates['operations_per_second'] / 1e9:.0f} Gop/s"
    )
