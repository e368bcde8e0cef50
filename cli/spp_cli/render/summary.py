"""One screen per result: what was decided, what it saves, and what was checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render import sections
from spp_cli.render.look import FAINT, STRONG, Look, byte_size, ranges, seconds

if TYPE_CHECKING:
    from spp_export import ConvertResult, ExportResult, OnnxOptions, PlanResult, RecoverResult
    from spp_export.models.engines import Engine
    from spp_export.models.shape import ModelShape
    from spp_export.planning import Plan
    from spp_export.planning.bound import Predicted

_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


def export_summary(result: ExportResult, look: Look, peak_bytes: int) -> RenderableType:
    """Of a written export, or of a dry run."""
    if result.path is None:
        target = "dry run, nothing written"
        end: list[RenderableType] = [Text(), tensor_changes(result.tensors, look)]
        if result.needs:
            end += [Text(), _needs(result.needs.to_dict())]
    else:
        target, end = str(result.path), _verdict(result.report)
        if result.onnx:
            end = [*_graph(result.onnx, result.graph_bytes, result.report), *end]
        if result.gguf:
            end = [*_file(result.gguf.summary(), result.graph_bytes, result.report), *end]
    before = _compiled(
        result.plan, result.shape, result.predicted, result.engines, target, look, end
    )
    stages = [f"{stage} {seconds(spent)}" for stage, spent in result.seconds.items()]
    last = ", ".join([*stages, f"peak memory {byte_size(peak_bytes)}"])
    return Group(*before, Text(), Text(last, style=FAINT))


def convert_summary(result: ConvertResult, look: Look) -> RenderableType:
    """Of a checkpoint that was written as ONNX or GGUF."""
    from spp_export import OnnxOptions

    checked: list[RenderableType] = [Text("not checked: --no-verify", style=FAINT)]
    if result.report is not None:
        checked = [sections.checks(result.report["checks"])]
    return Group(
        Text(f"{result.path}   {result.layout} layout", style="bold"),
        *(
            _graph(result.options, result.nbytes, result.report)
            if isinstance(result.options, OnnxOptions)
            else _file(result.form, result.nbytes, result.report)
        ),
        Text(),
        *checked,
        Text(),
        sections.engine_list(result.engines),
    )


def plan_summary(result: PlanResult, target: str, look: Look) -> RenderableType:
    """Of a compiled plan: the same without what only a written model can tell."""
    return Group(
        *_compiled(result.plan, result.shape, result.predicted, result.engines, target, look, [])
    )


def tensor_changes(tensors: Sequence[Mapping[str, Any]], look: Look) -> Table:
    """Tensors with their old and new shapes; layers where both are equal share a row."""
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor["name"])
        head, tail = (match[1], match[3]) if match else (tensor["name"], "")
        key = (head, tail, _sides(tensor["dense"]), _sides(tensor["slim"]))
        rows.setdefault(key, []).extend([int(match[2])] if match else [])
    table = Table.grid(padding=(0, 3, 0, 0))
    for (head, tail, old, new), layers in rows.items():
        numbers = ranges(layers).replace(" ", "")
        braced = f"{{{numbers}}}" if len(layers) > 1 else numbers
        table.add_row(f"{head}{braced}{tail}", f"{old} {look.arrow} {new}")
    return table


def _needs(needs: Mapping[str, Any]) -> Table:
    """What the run would take of disk and memory, beside what is free."""
    table = Table.grid(padding=(0, 3, 0, 0))
    for name, found in needs.items():
        parts = [f"{part} {byte_size(count)}" for part, count in found["bytes"].items() if count]
        total, free = sum(found["bytes"].values()), found["free"]
        table.add_row(name, f"{byte_size(total)} of {byte_size(free)} free", ", ".join(parts))
    return table


def _compiled(
    plan: Plan,
    shape: ModelShape,
    predicted: Predicted,
    engines: Sequence[Engine],
    target: str,
    look: Look,
    checked: Sequence[RenderableType],
) -> list[RenderableType]:
    return [
        sections.title(plan, target, look),
        Text(),
        sections.decision(plan, shape, look),
        Text(),
        sections.sizes(plan, shape, predicted),
        *sections.stock_counts(plan),
        Text(),
        *sections.bounds(predicted),
        *sections.latency(predicted),
        *checked,
        Text(),
        sections.engine_list(engines),
    ]


def _graph(
    form: OnnxOptions, nbytes: int, report: Mapping[str, Any] | None
) -> list[RenderableType]:
    """The graph's form and size, and what quantisation cost."""
    quant = form.quant or "not quantised"
    line = f"ONNX graph: {form.attention}, {form.precision}, {quant}, {byte_size(nbytes)}"
    found: list[RenderableType] = [Text(), Text(line)]
    cost = (report or {}).get("quantisation")
    if cost:
        text = f"against the unquantised graph: KL {cost['mean_kl']:.3g}, same first token "
        found.append(Text(f"{text}{cost['top1']:.1%}"))
    return found


def _file(
    form: Mapping[str, Any], nbytes: int, report: Mapping[str, Any] | None
) -> list[RenderableType]:
    """A GGUF file's form and size, what was not quantised, and what quantisation cost."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in form["tensors"].items())
    line = f"GGUF file: architecture {form['architecture']}, {byte_size(nbytes)}; tensors: {kinds}"
    found: list[RenderableType] = [Text(), Text(line)]
    if left := form["not_quantised"]:
        found.append(Text(f"not quantised, for rows are no multiple of 32: {len(left)} tensors"))
    cost = (report or {}).get("quantisation")
    if cost:
        text = f"against the unquantised model: KL {cost['mean_kl']:.3g}, same token "
        found.append(Text(f"{text}{cost['top1']:.1%}"))
    return found


def _verdict(report: Mapping[str, Any] | None) -> list[RenderableType]:
    if report is None:
        return [Text(), Text("not checked: --no-verify", style=FAINT)]
    return [Text(), sections.checks(report["checks"]), sections.quality(report)]


def recover_summary(result: RecoverResult, look: Look) -> RenderableType:
    """What training did, and the checks of what was written."""
    tenth = max(1, len(result.losses) // 10)
    first, last = result.losses[:tenth], result.losses[-tenth:]
    line = Text(f"{len(result.losses)} steps", style=STRONG)
    line.append(f"   loss {sum(first) / tenth:.3f} {look.arrow} {sum(last) / tenth:.3f} nats")
    if result.resumed:
        line.append(f", from step {result.resumed} on", style=FAINT)
    found: list[RenderableType] = [line]
    if result.before and result.after:
        found.append(
            Text(
                f"perplexity {result.before.slim_perplexity:.2f} {look.arrow} "
                f"{result.after.slim_perplexity:.2f}, dense {result.after.dense_perplexity:.2f}"
            )
        )
    return Group(*found, *_verdict(result.report))


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
