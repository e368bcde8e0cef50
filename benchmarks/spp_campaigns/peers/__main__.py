"""Command line of the package: see its docstring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spp_campaigns.big_checkpoints import build
from spp_campaigns.command import finish, machine, parser, scratch, table, words
from spp_campaigns.peers import __doc__ as description
from spp_campaigns.peers.candidates import CANDIDATES, TORCH_PRUNING
from spp_campaigns.peers.measure import EQUAL_WITHIN, Options, measure
from spp_campaigns.peers.plans import PLANS
from spp_export.models.hub import locate_model

_COLUMNS = {
    "": "{name}",
    "s": "{seconds:.2f}",
    "s flushed": "{flushed_seconds:.2f}",
    "peak MB": "{peak_mb:.0f}",
    "file MB": "{file_mb:.1f}",
    "loads": "{loads}",
    "units": "{units}",
    "max logit diff": "{difference:.1e}",
    "equal": "{equality}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if spp's own rows are not equal to the masked model."""
    made = parser(description, writes=True)
    made.add_argument("--model", action="append", help="directory or demo, repeatable")
    made.add_argument(
        "--gigabytes", type=float, action="append", help="a random bf16 model; repeatable"
    )
    made.add_argument("--only", action="append", choices=list(CANDIDATES), help="repeatable")
    made.add_argument("--plan", action="append", choices=PLANS, help="repeatable")
    made.add_argument(
        "--precision", choices=list(EQUAL_WITHIN), default="float32", help="for comparing logits"
    )
    made.add_argument("--limit", type=float, default=300, help="seconds that a step may take")
    options = made.parse_args(arguments)
    chosen = [CANDIDATES[name] for name in options.only or CANDIDATES]
    settings = Options(chosen, options.plan, options.precision, options.limit)
    models = []
    for name in options.model or (() if options.gigabytes else ("demo",)):
        with scratch(options) as place:
            dense = locate_model(name)
            models.append(measure(dense.path, dense.name, settings, place))
    for size in options.gigabytes or ():
        with scratch(options) as place:
            model = place / "model"
            model.mkdir()
            build(model, size)
            models.append(measure(model, f"random, {size:g} GB", settings, place))
    document = {"machine": machine(TORCH_PRUNING), "models": models}
    finish(options, document, *report(document))
    return int(not _ours_are_right(models))


def report(document: Mapping[str, Any]) -> Iterator[str]:
    """The machine, then a table for every model and plan, and below it a line for each failure."""
    yield words(document["machine"])
    for model in document["models"]:
        yield _heading(model)
        for case in model["cases"]:
            yield f"{case['plan']}  {_reference(case['reference'])}"
            yield table(_COLUMNS, [_shown(row) for row in case["rows"]])
            yield from notes(case)


def _heading(model: Mapping[str, Any]) -> str:
    return (
        f"\n{model['model']}, {model['dtype']}, {model['source_bytes'] / 1e6:.0f} MB; cp "
        f"{model['cp_seconds']:.1f} s, cp and flush {model['cp_and_flush_seconds']:.1f} s"
    )


def _reference(reference: Mapping[str, Any]) -> str:
    if "largest_logit" not in reference:
        return f"(no reference: {reference.get('skipped') or reference.get('error')})"
    return (
        f"(largest logit {reference['largest_logit']:.3g}, moved by the plan by up to "
        f"{reference['moved_by_plan']:.3g})"
    )


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the fields that its cells show."""
    shown = dict(row)
    if "error" in row:
        return shown
    shown |= {"peak_mb": row["peak_bytes"] / 1e6, "file_mb": row["file_bytes"] / 1e6}
    if "load_error" in row:
        return shown | {"loads": "no"}
    shown["units"] = "as asked" if row["as_asked"] else "wrong"
    shown["equality"] = {True: "yes", False: "no", None: "?"}[row.get("equal")]
    return shown


def notes(case: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything that failed or was left out."""
    for row in case["rows"]:
        if "error" in row:
            yield f"{row['name']}: {row['error']}"
        elif "load_error" in row:
            yield f"{row['name']}: does not load: {row['load_error']}"
        elif not row["as_asked"]:
            yield (
                f"{row['name']}: {row['wrong_tensors']} of {row['tensors']} tensors are not what "
                f"was asked for: {row['first_wrong']}"
            )
        if "run_error" in row:
            yield f"{row['name']}: does not run: {row['run_error']}"
        if "skipped" in row:
            yield f"{row['name']}: logits not compared: {row['skipped']}"


def _ours_are_right(models: Sequence[dict[str, Any]]) -> bool:
    rows = [row for model in models for case in model["cases"] for row in case["rows"]]
    ours = [row for row in rows if row["name"] == "spp"]
    return all(row.get("as_asked") and row.get("equal", True) for row in ours)


if __name__ == "__main__":
    raise SystemExit(main())
