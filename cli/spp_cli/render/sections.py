"""The pieces that summaries are put together from, each a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render.headmap import LABEL_WIDTH, MOST_HEAD_ROWS, head_map
from spp_cli.render.look import BAD, FAINT, GOOD, KEPT, STRONG, Look, byte_size, single_line

if TYPE_CHECKING:
    from spp_export.models.engines import Engine
    from spp_export.models.shape import ModelShape
    from spp_export.planning import Plan
    from spp_export.planning.bound import Predicted

# Below this a bound is not worth a measurement: no engine's timing is steadier.
NO_GAIN = 1.02
_NAME, _BAR, _MOST_DOMAINS = 12, 12, 9
_SEPARATION, _ANGLE = 10, 4
_MIXTURE_WIDTH = _NAME + 1 + _BAR + 1 + 6


_READ_MORE = "--calibration-tokens reads more"


def title(plan: Plan, target: str, look: Look) -> Text:
    """From what to what, and how."""
    text = Text()
    text.append(
        f"{single_line(plan.model_source)} {look.arrow} {single_line(target)}", style=STRONG
    )
    layout = f"{plan.layout} layout, padded" if plan.padded else f"{plan.layout} layout"
    how = f"{layout}, compensation {plan.compensation}"
    if plan.calibration.get("matmul") == "bfloat16":
        how += ", calibrated in bfloat16"
    requested = plan.budget.get("asked")
    if isinstance(requested, Mapping):
        how += "".join(f", {key.replace('_', ' ')} {value}" for key, value in requested.items())
    return text.append("   ").append(single_line(how), style=FAINT)


def text_read(scenario: Mapping[str, Any]) -> list[RenderableType]:
    """How much of a scenario's text was read."""
    match scenario.get("tokens"):
        case {
            "calibration": {"read": int(read), "of": int(there)},
            "held_out": {"read": int(read_apart), "of": int(there_apart)},
        }:
            line = f"read {read:,} of {there:,} tokens to calibrate on"
            line += f", {read_apart:,} of {there_apart:,} held out"
            more = "" if (read, read_apart) == (there, there_apart) else f"; {_READ_MORE}"
            return [Text(line + more, style=FAINT)]
    # Of a plan that was written by hand, nothing is known but that this is JSON.
    return []


def tokens_read(tokens: Mapping[str, Any]) -> list[Text]:
    """How much of a text was read."""
    more = "" if tokens["read"] == tokens["of"] else f"; {_READ_MORE}"
    return [Text(f"read {tokens['read']:,} of {tokens['of']:,} tokens{more}", style=FAINT)]


def mixture(diagnosis: Mapping[str, Any], look: Look) -> list[Text]:
    """Domains by share, as bars; then breadth and regime."""
    match diagnosis:
        case {"mixture": dict(shares), "breadth": breadth, "regime": regime}:
            pass
        case _:
            return []
    # Of a plan that was written by hand, nothing is known but that this is JSON.
    numbers = (*shares.values(), breadth)
    if not all(type(number) in (int, float) and 0 <= number <= 1 for number in numbers):
        return []
    ordered = sorted(shares.items(), key=lambda item: -float(item[1]))
    rows = [(single_line(name)[:_NAME], float(share)) for name, share in ordered[:_MOST_DOMAINS]]
    if rest := ordered[_MOST_DOMAINS:]:
        rows.append((f"{len(rest)} others", sum(float(share) for _, share in rest)))
    lines = []
    for name, share in rows:
        line = Text(f"{name:<{_NAME}} ")
        filled = round(share * _BAR)
        line.append(look.bar * filled, style=KEPT).append(" " * (_BAR - filled + 1))
        lines.append(line.append(f"{share:6.1%}"))
    lines.append(Text())
    lines.append(Text(f"breadth {breadth:.2f}", style=FAINT))
    lines.append(Text(single_line(regime), style=FAINT))
    return lines


def unknown_domain(diagnosis: Mapping[str, Any]) -> list[Text]:
    """For text of a domain that artifacts do not know: what was done instead, and what to do."""
    mixture = diagnosis.get("mixture")
    if diagnosis.get("regime") != "out-of-domain" or not isinstance(mixture, Mapping):
        return []
    known = single_line(", ".join(map(str, mixture)))
    instead = (
        "All of them count alike, beside the scenario's own text."
        if diagnosis.get("unfamiliar") is True
        else "The nearest of them count as shown, beside the scenario's own text."
    )
    return [
        Text("out-of-domain: text of a domain that the artifacts do not know", style=BAD),
        Text(f"They know {known}. {instead}"),
        Text("spp probe --add-domain NAME=FILE -o DIR adds a domain; then --artifacts DIR."),
    ]


def remarks_on(plan: Plan) -> list[Text]:
    """What has to be told of this kind of model."""
    return [Text(single_line(remark), style=FAINT) for remark in plan.remarks]


def domain_axes(axes: Mapping[str, Any], look: Look) -> list[RenderableType]:
    """How far apart the candidate domains are, and the angles between their axes in degrees."""
    names, selected = axes["candidates"], axes.get("selected", ())
    wide = _NAME + _SEPARATION + _ANGLE * (len(names) + 1) <= look.width
    table = Table(box=None, padding=(0, 1, 0, 0), header_style=FAINT)
    for header in ("", "domain", "apart", *(range(1, len(names) + 1) if wide else ["nearest"])):
        table.add_column(
            str(header), justify="left" if header in {"domain", "nearest"} else "right"
        )
    for i, name in enumerate(names):
        angles = axes["angles"][i]
        cells = [_angle(i, j, angle) for j, angle in enumerate(angles)]
        if not wide:
            nearest = min((j for j in range(len(names)) if j != i), key=angles.__getitem__)
            cells = [f"{single_line(names[nearest])[:_NAME]} {cells[nearest]}"]
        apart = axes["separation"].get(name)
        row = [
            str(i + 1),
            single_line(name)[:_NAME],
            "-" if apart is None else f"{apart:.1f}",
            *cells,
        ]
        table.add_row(*row, style=STRONG if name in selected else FAINT)
    where = (
        f"axes of {axes['dimensions']} dimensions at layer {axes['layer']}, "
        f"{float(axes['variance']):.0%} of the variance; {len(selected)} of {len(names)} taken"
    )
    meaning = "apart: distance to the nearest domain in deviations; then angles in degrees"
    return [Text(where, style=FAINT), table, Text(meaning, style=FAINT)]


def _angle(row: int, column: int, degrees: float) -> str:
    return "" if row == column else f"{degrees:.0f}"


def decision(plan: Plan, shape: ModelShape, look: Look) -> RenderableType:
    """The mixture beside the head map where both fit, else one above the other."""
    left = mixture(plan.diagnosis, look)
    room = look.width - (_MIXTURE_WIDTH + 3 if left else 0) - LABEL_WIDTH
    cell = 2 if 2 * len(plan.layers) <= room else 1
    lines = head_map(plan.layers, shape, look, cell)
    grouped = shape.query_heads > MOST_HEAD_ROWS
    unit = "query heads kept per KV group" if grouped else "query heads kept"
    lines.insert(0, Text(f"{unit}, by layer", style=FAINT))
    if not left:
        return Group(*lines)
    left.insert(0, Text("domains of the scenario", style=FAINT))
    if cell * len(plan.layers) > room:
        return Group(*left, Text(), *lines)
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(width=_MIXTURE_WIDTH, no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row(Group(*left), Group(*lines))
    return grid


def sizes(plan: Plan, shape: ModelShape, predicted: Predicted) -> Table:
    """What the dense model has, what the slim one has, and what is saved."""
    slim = plan.written_shapes(shape)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=FAINT)
    table.add_column("")
    for name in ("dense", "slim", "saved"):
        table.add_column(name, justify="right")
    rows = [
        ("parameters", predicted.dense_parameters, predicted.parameters, _thousands),
        (
            "of q, k, v, o",
            shape.head_parameters(shape.layers),
            shape.head_parameters(slim),
            _thousands,
        ),
        ("weights on disk", predicted.dense_file_bytes, predicted.file_bytes, byte_size),
        ("KV cache per token", predicted.dense_kv_bytes, predicted.kv_bytes, _bytes),
    ]
    if mlps := shape.mlp_parameters:
        gone = shape.expert_parameters(shape.layers) - shape.expert_parameters(slim)
        rows.insert(2, ("of experts and MLPs", mlps, mlps - gone, _thousands))
        whole, stay = (sum(shape.experts_in(layers)) for layers in (shape.layers, slim))
        rows.insert(3, ("experts", whole, stay, _thousands))
        if any(layer.dropped_channels for layer in slim):
            before, after = map(shape.expert_channels_in, (shape.layers, slim))
            rows.insert(4, ("channels of experts", before, after, _thousands))
    if mixers := shape.mixer_parameters:
        rows.insert(2, ("of what stays beside heads", mixers, mixers, _thousands))
    dense, channels = (sum(x.channels for x in layers) for layers in (shape.layers, slim))
    if channels != dense:
        rows.insert(2, ("MLP channels", dense, channels, _thousands))
    for name, before, after, form in rows:
        saved = Text(f"{1 - after / before:.1%}", style=GOOD if after < before else "")
        table.add_row(name, form(before), form(after), saved)
    return table


def _thousands(count: float) -> str:
    return f"{count:,}"


def _bytes(count: float) -> str:
    return f"{count:,} B"


def stock_counts(plan: Plan) -> list[Text]:
    """For a uniform layout, which counts of query heads there were to choose from."""
    realised = plan.budget.get("realised", {})
    counts = realised.get("accepted_query_heads") if isinstance(realised, Mapping) else None
    if plan.layout != "uniform" or not counts:
        return []
    known = ", ".join(str(count) for count in counts)
    return [Text(f"query heads that the stock config accepts: {known}", style=FAINT)]


def moments(plan: Plan) -> list[Text]:
    """For wide MLPs, what their re-fit was made of."""
    words = {
        "whole": "down_proj is re-fitted on the moments of all channels together",
        "blocks": "down_proj is re-fitted in blocks of channels",
    }
    made = plan.calibration.get("moments")
    return [Text(words[made], style=FAINT)] if made in words else []


def bounds(predicted: Predicted) -> list[Text]:
    """The best that decoding can gain, per case; bytes alone decide it."""
    lines = []
    for case in predicted.decode:
        line = Text(f"decode, batch {case.batch} x {case.context} tokens".ljust(31))
        line.append(f"at best {case.speedup:.2f}x", style=GOOD if case.speedup >= NO_GAIN else "")
        if case.speedup < NO_GAIN:
            line.append("  no gain possible here", style=FAINT)
        lines.append(line)
    return lines


def latency(predicted: Predicted) -> list[Text]:
    """What a step takes by the measured table, if one decided."""
    step = predicted.latency
    if step is None:
        return []
    table = step.table
    line = Text(f"{table.phase}, batch {table.batch} x {table.context} tokens".ljust(31))
    line.append(f"{step.dense / 1e6:.3f} ms dense, {step.slim / 1e6:.3f} ms slim")
    line.append(f" ({step.speedup:.2f}x)", style=STRONG)
    where = single_line(f"{table.device}, {table.dtype}")
    return [line, Text(f"by the profile {table.sha256[:12]}, {where}", style=FAINT)]


def checks(results: Sequence[Mapping[str, Any]]) -> Table:
    """Each check with its verdict and its figures."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for check in results:
        passed = bool(check["passed"])
        figures = ""
        if "found" in check:
            figures = f"found {check['found']:.2g}, at most {check['limit']:.2g}"
        detail = single_line(check.get("detail", ""))
        if not passed or not figures:
            figures = "; ".join(part for part in (figures, detail) if part)
        verdict = Text("ok", style=GOOD) if passed else Text("FAILED", style=BAD)
        table.add_row(
            verdict, single_line(check["name"]), Text(figures, style=FAINT if passed else "")
        )
    return table


def quality(report: Mapping[str, Any]) -> list[Text]:
    """How far the answers are from the dense model's, or why that is not known; and what of it
    quantising cost."""
    if not (figures := report.get("quality")):
        why = "quality not measured: it takes held-out text, a scenario of at least four prompts"
        return [Text(why, style=FAINT), *quantisation(report)]
    return [*_measured("quality", figures, "dense", "slim"), *quantisation(report)]


def quantisation(report: Mapping[str, Any]) -> list[Text]:
    """What quantising cost, where something was quantised."""
    if "quantisation" not in report:
        return []
    if not (figures := report["quantisation"]):
        return [Text("cost of quantising not measured: the model has no tokenizer", style=FAINT)]
    return _measured("quantising", figures, "before", "after")


def _measured(what: str, figures: Mapping[str, Any], before: str, after: str) -> list[Text]:
    """Figures with their intervals, what they were measured on, and what to think of them."""
    from spp_export.evaluation.remarks import remarks

    intervals = figures.get("intervals", {})

    def figure(name: str, form: str) -> str:
        ends = [f"{end:{form}}" for end in intervals.get(name, ())]
        value = "not finite" if figures[name] is None else f"{figures[name]:{form}}"
        return f"{value} [{', '.join(ends)}]" if ends else value

    distances = f"KL {figure('mean_kl', '.3f')}, same token {figure('top1', '.1%')}"
    more = [f"perplexity {figure('ratio', '.3f')} times"]
    perplexities = [figures["dense_perplexity"], figures["slim_perplexity"]]
    if None not in perplexities:
        more.append(f"{perplexities[0]:.2f} {before}, {perplexities[1]:.2f} {after}")
    brackets = "; 95 % intervals in brackets" if intervals else ""
    lines = [
        Text(f"{what}: ").append(distances, style=STRONG),
        Text(f"  {', '.join(more)}", style=FAINT),
        Text(f"  {figures['tokens']:,} tokens: {figures['source']}{brackets}", style=FAINT),
    ]
    return [
        *lines,
        *(
            Text(f"  {remark}", style=BAD)
            for remark in remarks(figures["tokens"], figures["mean_kl"])
        ),
    ]


def engine_list(engines: Sequence[Engine]) -> Table:
    """Who loads the output, and how."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for engine in engines:
        style = {"yes": GOOD, "expected": "", "no": FAINT}[engine.loads]
        table.add_row(engine.name, Text(engine.loads, style=style), Text(engine.how, style=FAINT))
    return table
