"""What `spp probe` and `spp export` of a large model take on many cards: bytes, passes and time.

`python -m spp_campaigns.estimate` prints tables for Llama-3.1-405B on 8 machines of 8 cards.
Nothing is measured: sizes follow from the model's config and from this repository's own limits,
times from them and from the rates of the hardware, all of which are options. There are two ways to
run: `map`, where a process on every machine spreads the model over its cards, which work one after
the other; and `tensor` on one machine, whose cards work together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spp_bench.shapes.shapes import Published
from spp_export.calibration.answers import MOST
from spp_export.calibration.cache import statistics_bytes
from spp_export.calibration.engines.batches import steps
from spp_export.common.json_files import read_json
from spp_export.common.options import DEFAULT_ANSWER_TOKENS, DEFAULT_CALIBRATION_TOKENS, WINDOW
from spp_export.domains.probe_model import DIALOGUES
from spp_export.models.families import family_of
from spp_export.models.shape import ModelShape

LLAMA_405B = Published(
    "llama-3.1-405b", "llama", 126, 16384, 128, 8, 128, 53248, 128256, 131072, 500_000.0
)
_ELEMENT_BYTES = 2
# A backward pass costs as much as two forward ones.
_WITH_BACKWARD = 3
# Statistics that scores of `probe` are made of; criterion and re-fit of `export` read all.
_PLAIN = ("attention", "mlp")
_ALL = (*_PLAIN, "attention loss", "mlp loss")


@dataclass(frozen=True)
class Hardware:
    """Machines of cards; rates in bytes or operations a second, and the share that is reached."""

    machines: int
    cards: int
    memory: float
    bandwidth: float
    operations: float
    single: float
    network: float
    disk: float
    reached: float


@dataclass(frozen=True)
class Way:
    """How a model runs: `processes` hold it once each, and `busy` cards of each work at once."""

    name: str
    processes: int
    busy: int


@dataclass(frozen=True)
class Work:
    """What a command asks of the dense model: tokens read forward, tokens read forward and
    backward, prompts answered, and collections whose statistics are gathered, with their tokens."""

    forward: int
    backward: int
    prompts: int
    gathered: int
    collections: int
    kinds: tuple[str, ...]


def probe_work(domains: int) -> Work:
    """At most: every pool has as many tokens as are read of one, in both of its parts."""
    part = domains * DEFAULT_CALIBRATION_TOKENS
    dialogues = domains * DIALOGUES
    # Both parts pooled, joined texts, second moments of validation text, statistics.
    return Work(5 * part, dialogues * WINDOW, dialogues, part, domains, _PLAIN)


def export_work(domains: int) -> Work:
    """At most: a long scenario, both of whose parts are answered; the pools' dialogues are read
    with it, and bring their gradients."""
    own = DEFAULT_CALIBRATION_TOKENS
    gathered = own + domains * DIALOGUES * WINDOW
    return Work(own + gathered, own, 2 * MOST, gathered, domains + 1, _ALL)


def pass_operations(shape: ModelShape, tokens: int) -> float:
    """2 P and what attention takes in a window, for every token of a forward pass."""
    read = shape.parameters(shape.layers) - shape.vocab_size * shape.hidden_size
    return tokens * (2 * read + 4 * WINDOW * shape.num_layers * shape.query_heads * shape.head_dim)


def sums_bytes(shape: ModelShape, kinds: Sequence[str]) -> int:
    """Of the second moments of a collection, four bytes each."""
    return sum(statistics_bytes(shape, kind) for kind in kinds)


def moment_operations(shape: ModelShape, work: Work) -> float:
    """A product and a sum for each second moment and token."""
    return work.gathered * 2 * sums_bytes(shape, work.kinds) / 4


def command_seconds(shape: ModelShape, work: Work, way: Way, on: Hardware) -> dict[str, float]:
    """Seconds of the parts of a command that the dense model takes part in."""
    weights = _ELEMENT_BYTES * shape.parameters(shape.layers)
    rate = way.processes * way.busy * on.operations * on.reached
    tokens = work.forward + _WITH_BACKWARD * work.backward
    rounds = -(-steps(work.prompts, 1) // way.processes) * DEFAULT_ANSWER_TOKENS
    sums = work.collections * sums_bytes(shape, work.kinds)
    return {
        "weights from disk": weights / on.disk,
        "passes": pass_operations(shape, tokens) / rate,
        # In single precision, by one card of each process.
        "moments": moment_operations(shape, work) / (way.processes * on.single * on.reached),
        "answers": rounds * weights / (way.busy * on.bandwidth * on.reached),
        "sums over the network": sums / on.network if way.processes > 1 else 0.0,
        "statistics to disk": sums / on.disk,
    }


def table(shape: ModelShape, domains: int, on: Hardware) -> str:
    """Sizes, and the seconds of both commands in both ways, as Markdown."""
    parameters = shape.parameters(shape.layers)
    weights = _ELEMENT_BYTES * parameters
    per_card = weights / on.cards
    rows = [
        ("parameters P", f"{parameters / 1e9:.1f} billion"),
        ("weights, 2 P bytes", _size(weights)),
        ("weights on a card, 2 P / cards", f"{_size(per_card)} of {_size(on.memory)}"),
    ]
    for name, work in (("probe", probe_work(domains)), ("export", export_work(domains))):
        rows += [
            (f"{name}: tokens read, of them with gradients", _pair(work.forward, work.backward)),
            (f"{name}: prompts answered", f"{work.prompts}"),
            (
                f"{name}: statistics of {work.collections} collections, 4 bytes a moment",
                _size(work.collections * sums_bytes(shape, work.kinds)),
            ),
        ]
    lines = ["| size | |", "|---|---:|", *(f"| {title} | {value} |" for title, value in rows), ""]
    ways = (Way("map", on.machines, 1), Way("tensor", 1, on.cards))
    found = [
        command_seconds(shape, of(domains), way, on)
        for of in (probe_work, export_work)
        for way in ways
    ]
    heads = [f"{name}, {way.name}" for name in ("probe", "export") for way in ways]
    lines += [f"| time | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    lines += [
        f"| {part} | {' | '.join(_time(seconds[part]) for seconds in found)} |" for part in found[0]
    ]
    lines.append(f"| together | {' | '.join(_time(sum(each.values())) for each in found)} |")
    return "\n".join(lines)


def _pair(first: int, second: int) -> str:
    return f"{first + second:,}, {second:,}"


def _size(count: float) -> str:
    return f"{count / 1e12:.2f} TB" if count >= 1e12 else f"{count / 1e9:.0f} GB"


def _time(seconds: float) -> str:
    if not seconds:
        return ""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--config", type=Path, help="config.json of another model")
    made.add_argument("--domains", type=int, default=6, help="pools")
    for name, kind, default, words in _RATES:
        made.add_argument(f"--{name}", type=kind, default=default, help=words)
    options = made.parse_args(arguments)
    shape = LLAMA_405B.shape
    if options.config:
        config = read_json(options.config, what="config")
        shape = family_of(config).read_shape(config, _ELEMENT_BYTES)
    on = Hardware(**{name: getattr(options, name) for name, *_ in _RATES})
    print(table(shape, options.domains, on))


# An H200 as its data sheet has it; network, disk and what is reached are assumed.
_RATES: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
    ("machines", int, 8, "machines"),
    ("cards", int, 8, "cards of a machine"),
    ("memory", float, 141e9, "bytes of a card"),
    ("bandwidth", float, 4.8e12, "bytes a second of a card's memory"),
    ("operations", float, 989e12, "operations a second of a card, half precision"),
    ("single", float, 67e12, "the same in single precision"),
    ("network", float, 50e9, "bytes a second into a machine"),
    ("disk", float, 5e9, "bytes a second of a machine's disk"),
    ("reached", float, 0.4, "share of a card's rates that is reached"),
)

if __name__ == "__main__":
    main()
