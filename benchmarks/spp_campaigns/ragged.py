"""Ways to compute attention whose groups differ in size:
`python -m spp_campaigns.ragged [--device] [--json FILE]`.

`ragged` is what the switch of spp_kernels chooses, `triton` its kernels (on CUDA), `folded` and
`expanded` the two ways it has with torch's attention. `padded` is torch's grouped-query attention
over groups that were filled with heads of zeros, as in an export for other engines; its queries
come filled, since such an export computes them that way.

One sample is a pass over copies of a case, more than the processor's cache holds at once, as with
the layers of a model; on CUDA it is a captured graph, so that nothing waits for Python. All ways
take turns in one run, and the one that begins changes from round to round. The bound is the time
for the bytes and operations of the heads that are kept, at the rates that the device reaches in
the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spp_bench.bounds import Rates, Work
from spp_bench.clocks import cold_clock_for, no_collection
from spp_bench.device_rates import measure_rates
from spp_bench.graphs import cuda_graph, on_device
from spp_bench.provenance import machine, revision, versions
from spp_bench.timing import quantiles
from spp_kernels.ragged_attention import Implementation, ragged_attention, sdpa
from spp_kernels.ragged_attention.problem import Groups, visible

# Query heads of each KV group: a regular layer of 32 heads, that layer after pruning, extremes.
PATTERNS = {
    "even": (4, 4, 4, 4, 4, 4, 4, 4),
    "light": (4, 4, 3, 4, 4, 2, 4, 4),
    "uneven": (4, 4, 1, 4, 2, 4, 3, 4),
    "one wide": (7, 1, 1, 1),
}
HEAD_DIM = 128
# (batch, context) of decoding and of prefill
GRIDS = {
    "cpu": (tuple(product((1, 4), (512, 2048, 8192))), ((1, 256), (1, 1024), (4, 256))),
    "cuda": (
        tuple(product((1, 8, 32), (1024, 4096, 16384, 32768))),
        ((1, 1024), (1, 8192), (8, 2048)),
    ),
}
_COLD_BYTES = 1 << 28
# Of the bound, which was itself measured.
_NOISE = 0.05
_CLOSE = 1.02

Way = Callable[["Problem"], Tensor]


@dataclass(frozen=True)
class Case:
    """`queries` new positions at the end of a `context`, for `batch` rows."""

    phase: str
    batch: int
    queries: int
    context: int
    pattern: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Query heads per group."""
        return PATTERNS[self.pattern]

    @property
    def group_of_query(self) -> tuple[int, ...]:
        """The group of each query head."""
        return tuple(group for group, size in enumerate(self.sizes) for _ in range(size))

    def work(self, element_bytes: int) -> Work:
        """Queries and the cache are read once and the result is written; the operations are those
        of what queries see."""
        heads, earlier = sum(self.sizes), self.context - self.queries
        vectors = 2 * len(self.sizes) * self.context + 2 * heads * self.queries
        pairs = heads * (self.queries * earlier + self.queries * (self.queries + 1) / 2)
        return Work(
            self.batch * vectors * HEAD_DIM * element_bytes, self.batch * pairs * 4 * HEAD_DIM
        )


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; `wide` holds the queries padded with heads of zeros."""

    query: Tensor
    wide: Tensor
    key: Tensor
    value: Tensor
    case: Case
    groups: Groups

    @staticmethod
    def of(case: Case, device: str, dtype: torch.dtype) -> Problem:
        """Numbers at random."""
        groups = Groups.of(case.group_of_query, len(case.sizes), torch.device(device))

        def drawn(heads: int, positions: int) -> Tensor:
            return torch.randn((case.batch, heads, positions, HEAD_DIM), device=device).to(dtype)

        query = drawn(sum(case.sizes), case.queries)
        key, value = (drawn(len(case.sizes), case.context) for _ in range(2))
        wide = query.new_zeros(
            (case.batch, len(case.sizes) * groups.widest, case.queries, HEAD_DIM)
        )
        wide.index_copy_(1, groups.slot_of_head, query)
        return Problem(query, wide, key, value, case, groups)

    @property
    def causal(self) -> bool:
        """Whether a mask is needed: a single query sees everything."""
        return self.case.queries > 1


def ragged(problem: Problem, implementation: Implementation = "auto") -> Tensor:
    return ragged_attention(
        *(problem.query, problem.key, problem.value, problem.case.group_of_query),
        implementation=implementation,
    )


def folded(problem: Problem) -> Tensor:
    lengths = (problem.case.queries, problem.case.context)
    device = problem.query.device
    seen = visible(*lengths, None, None, True, None, device) if problem.causal else None
    tensors = (problem.query, problem.key, problem.value)
    return sdpa.folded(*tensors, problem.groups, seen, 1 / math.sqrt(HEAD_DIM))


def expanded(problem: Problem) -> Tensor:
    tensors = (problem.query, problem.key, problem.value)
    scale = 1 / math.sqrt(HEAD_DIM)
    return sdpa.expanded(*tensors, problem.groups, None, scale, is_causal=problem.causal)


def padded(problem: Problem) -> Tensor:
    return scaled_dot_product_attention(
        *(problem.wide, problem.key, problem.value), is_causal=problem.causal, enable_gqa=True
    )


def ways_on(device: str) -> dict[str, Way]:
    """The ways that run there."""
    ways: dict[str, Way] = {
        "ragged": ragged,
        "folded": folded,
        "expanded": expanded,
        "padded": padded,
    }
    if device.startswith("cuda"):
        ways["triton"] = partial(ragged, implementation="triton")
    return ways


def check(problem: Problem, ways: dict[str, Way]) -> None:
    """Raise AssertionError for a way whose result differs from the definition's."""
    # The definition holds all scores of a head; a few of the last queries show as much.
    last, key, value = problem.query[:1, :, -4:], problem.key[:1], problem.value[:1]
    groups = problem.case.group_of_query
    exact = ragged_attention(last, key, value, groups, implementation="naive").float()
    # Results are averages of values: rounding is relative to the largest of these.
    allowed = 8 * torch.finfo(problem.query.dtype).eps * float(value.abs().max())
    for name, way in ways.items():
        output = way(problem)[:1, :, -4:].float()
        if name == "padded":
            output = output.index_select(1, problem.groups.slot_of_head)
        error = float((output - exact).abs().max())
        assert error <= allowed, f"{name} is wrong by {error:.1e} in {problem.case}"


def repeated(way: Way, problems: Sequence[Problem], device: str) -> Callable[[], None]:
    """A pass over all problems; on CUDA as a graph."""

    def once() -> None:
        for problem in problems:
            way(problem)

    if not device.startswith("cuda"):
        once()
        return once
    with on_device(device):
        return cuda_graph(once)


def measure(
    case: Case, ways: dict[str, Way], rounds: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Quantiles of every way's milliseconds, in turns."""
    work = case.work(dtype.itemsize)
    copies = max(1, min(64, math.ceil(_COLD_BYTES / work.bytes))) if case.queries == 1 else 1
    problems = [Problem.of(case, device, dtype) for _ in range(copies)]
    check(problems[0], ways)
    passes = {name: repeated(way, problems, device) for name, way in ways.items()}
    clock, times = cold_clock_for(device), dict[str, list[float]]((name, []) for name in ways)
    names = list(ways)
    with no_collection():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(clock(passes[name]) / copies * 1e3)
    return {
        **{"phase": case.phase, "batch": case.batch, "context": case.context},
        **{"pattern": case.pattern, "sizes": list(case.sizes), "copies": copies},
        **{"bytes": work.bytes, "operations": work.operations},
        "ways": {name: quantiles(times_of_way, "ms") for name, times_of_way in times.items()},
    }


def cases(kind: str) -> Iterator[Case]:
    """The grid of a kind of device, decoding first."""
    decode, prefill = GRIDS[kind]
    for (batch, context), pattern in product(decode, PATTERNS):
        yield Case("decode", batch, 1, context, pattern)
    for (batch, context), pattern in product(prefill, PATTERNS):
        yield Case("prefill", batch, context, context, pattern)


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of every way."""
    return {name: figures["median_ms"] for name, figures in row["ways"].items()}


def title(row: dict[str, Any]) -> str:
    return f"{row['phase']:8} {row['batch']:5} {row['context']:8} {row['pattern']:9}"


def lost(results: Sequence[dict[str, Any]], way: str) -> Iterator[str]:
    """A line for every case where another way is faster by more than the samples scatter."""
    for row in results:
        own, times = row["ways"][way], medians(row)
        best = min(times, key=lambda name: times[name])
        if own["p20_ms"] > max(_CLOSE * times[best], row["ways"][best]["p80_ms"]):
            yield f"{title(row)} {best} takes {times[best] / times[way]:.2f} of its time"


def too_fast(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for every case that was faster than the device can be, which is a measurement
    error."""
    for row in results:
        best = min(figures["p20_ms"] for figures in row["ways"].values())
        if best < row["bound_ms"] * (1 - _NOISE):
            yield f"{title(row)} {best:.3f} ms, bound {row['bound_ms']:.3f} ms"


def best_rates(*measured: Rates) -> Rates:
    """The best rates that the device reached, since others may have used it meanwhile."""
    return Rates(
        max(rates.bytes_per_second for rates in measured),
        max(rates.operations_per_second for rates in measured),
    )


def table(results: Sequence[dict[str, Any]]) -> None:
    """Print the median milliseconds of every case and way."""
    heads = [f"{way:>9}" for way in ("bound", *results[0]["ways"])]
    print(f"{'phase':8} {'batch':>5} {'context':>8} {'groups':9}", *heads, "ms")
    for row in results:
        figures = (row["bound_ms"], *medians(row).values())
        print(title(row), *(f"{figure:9.3f}" for figure in figures))


def report(results: Sequence[dict[str, Any]]) -> bool:
    """Print where the switch and the kernels do not win; False if a figure is impossible."""
    names = list(results[0]["ways"])
    for way in [name for name in ("ragged", "triton") if name in names]:
        lines = list(lost(results, way))
        print(f"\n{way}: not the fastest in {len(lines)} of {len(results)} cases", *lines, sep="\n")
    impossible = list(too_fast(results))
    if impossible:
        print("\nfaster than the bound, so wrong:", *impossible, sep="\n")
    return not impossible


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and where the switch and the kernels do not win."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.ragged", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=9, help="samples of every way")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    name = options.dtype or ("bfloat16" if kind == "cuda" else "float32")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = measure_rates(options.device, name)
    ways, todo = ways_on(options.device), list(cases(kind))
    results = []
    for done, case in enumerate(todo):
        print(f"{done}/{len(todo)} {case}", file=sys.stderr)
        results.append(measure(case, ways, options.rounds, options.device, getattr(torch, name)))
    rates = best_rates(before, measure_rates(options.device, name))
    for row in results:
        seconds = rates.seconds(Work(row["bytes"], row["operations"]))
        row["bound_ms"] = round(seconds * 1e3, 4)
    facts = {
        **{"machine": machine(options.device), "versions": versions(), "revision": revision()},
        **{"dtype": name, "head_dim": HEAD_DIM},
        "bytes_per_second": round(rates.bytes_per_second),
        "operations_per_second": round(rates.operations_per_second),
    }
    print(json.dumps(facts))
    table(results)
    possible = report(results)
    if options.json:
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    sys.exit(0 if possible else 1)


if __name__ == "__main__":
    main()
