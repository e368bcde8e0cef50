"""One screen per result: what was decided, what it saves, and what was checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render import sections
from spp_cli.render.look import FAINT, STRONG, Look, byte_size, ranges, seconds

if TYPE_CHECKING:
    from spp_export import ConvertResult, ExportResult, PlanResult, RecoverResult
    from spp_export.calibration.stored import Kept
    from spp_export.evaluation.quality import Quality
    from spp_export.models.engines import Engine
    from spp_export.models.shape import ModelShape
    from spp_export.planning import Plan
    from spp_export.planning.bound import Predicted

_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


def export_summary(result: ExportResult, look: Look, peak_bytes: int) -> RenderableType:
    """Of a written export, or of a dry run."""
    if result.path is None:
        target = "dry run, nothing written"
        end: list[RenderableType] = [*_files(result.format, result.form, "not written")]
        end += [Text(), tensor_changes(result.tensors, look)]
        if result.needs:
            end += [Text(), _needs(result.needs.to_dict())]
    else:
        target, end, size = str(result.path), _verdict(result.report), byte_size(result.nbytes)
        end = [*_files(result.format, result.form, size), *end]
    before = _compiled(
        result.plan, result.shape, result.predicted, result.engines, target, look, end
    )
    stages = [f"{stage} {seconds(spent)}" for stage, spent in result.seconds.items()]
    last = ", ".join([*stages, f"peak memory {byte_size(peak_bytes)}"])
    return Group(*before, Text(), Text(last, style=FAINT), *_kept(result.kept))


def convert_summary(result: ConvertResult, look: Look) -> RenderableType:
    """Of a checkpoint that was written in another format."""
    from spp_export.formats.registry import format_of

    form = {**result.options.to_dict(), **result.form}
    checked: list[RenderableType] = [Text("not checked: --no-verify", style=FAINT)]
    if result.report is not None:
        checked = [sections.checks(result.report["checks"]), *sections.quantisation(result.report)]
    return Group(
        Text(f"{result.path}   {result.layout} layout", style="bold"),
        *_files(format_of(result.options).name, form, byte_size(result.nbytes)),
        Text(),
        *checked,
        Text(),
        sections.engine_list(result.engines),
    )


def plan_summary(result: PlanResult, target: str, look: Look) -> RenderableType:
    """Of a compiled plan: the same without what only a written model can tell."""
    return Group(
        *_compiled(result.plan, result.shape, result.predicted, result.engines, target, look, []),
        *_kept(result.kept),
    )


def _kept(kept: Kept) -> list[Text]:
    """What was left in the cache, where anything was."""
    if not kept.files:
        return []
    files = f"{len(kept.files)} files" if len(kept.files) > 1 else "a file"
    words = f"kept for later runs: {files} of statistics, {byte_size(kept.nbytes)} (spp cache)"
    return [Text(words, style=FAINT)]


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
    for name, need in needs.items():
        parts = [f"{part} {byte_size(count)}" for part, count in need["bytes"].items() if count]
        total, free = sum(need["bytes"].values()), need["free"]
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
        *sections.text_read(plan.scenario),
        Text(),
        sections.decision(plan, shape, look),
        *sections.unknown_domain(plan.diagnosis),
        *sections.remarks_on(plan),
        Text(),
        sections.sizes(plan, shape, predicted),
        *sections.stock_counts(plan),
        *sections.moments(plan),
        Text(),
        *sections.bounds(predicted),
        *sections.latency(predicted),
        *checked,
        Text(),
        sections.engine_list(engines),
    ]


def _files(name: str, form: Mapping[str, Any], size: str) -> list[RenderableType]:
    """What a format says of its files, and their size."""
    from spp_export.formats.registry import FORMATS

    lines = FORMATS[name].describe(form, size)
    return [Text(), *map(Text, lines)] if lines else []


def _verdict(report: Mapping[str, Any] | None) -> list[RenderableType]:
    if report is None:
        return [Text(), Text("not checked: --no-verify", style=FAINT)]
    return [Text(), sections.checks(report["checks"]), *sections.quality(report)]


def verify_summary(report: Mapping[str, Any]) -> RenderableType:
    """Checks, and the quality where it was measured."""
    measured = sections.quality(report) if "quality" in report else []
    return Group(sections.checks(report["checks"]), *measured)


def recover_summary(result: RecoverResult, look: Look) -> RenderableType:
    """What training did, and the checks of what was written."""
    lines: list[RenderableType] = []
    if layers := result.to_dict()["layers"]:
        line = Text(f"{layers['count']} layers learnt", style=STRONG)
        apart = f"{layers['before']:.4f} {look.arrow} {layers['after']:.4f}"
        line.append(f"   streams apart {apart} of what a layer writes")
        lines.append(line)
    if result.losses:
        tenth = max(1, len(result.losses) // 10)
        first, last = result.losses[:tenth], result.losses[-tenth:]
        line = Text(f"{len(result.losses)} steps", style=STRONG)
        line.append(f"   loss {sum(first) / tenth:.3f} {look.arrow} {sum(last) / tenth:.3f} nats")
        if result.resumed:
            line.append(f", from step {result.resumed} on", style=FAINT)
        lines.append(line)
    if result.before and result.after:
        before, after = result.before, result.after
        stages = [before, *([result.between] if result.between else []), after]

        def shown(figure: Callable[[Quality], str]) -> str:
            return f" {look.arrow} ".join(map(figure, stages))

        lines.append(
            Text(
                f"mean KL {shown(lambda of: f'{of.mean_kl:.3f}')}, same token "
                f"{shown(lambda of: f'{of.top1:.1%}')}, perplexity "
                f"{shown(lambda of: f'{of.slim_perplexity:.2f}')}, dense "
                f"{after.dense_perplexity:.2f}"
            )
        )
        lines.append(Text(f"on {after.tokens} tokens of {after.source}", style=FAINT))
    lines += sections.tokens_read(result.measured)
    return Group(*lines, *_verdict(result.report))


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
