"""Every family's contract, in figures: `make families`.

A tiny random model of every record, of every other form of one, and of every model that sees is
sliced by a random plan in each layout, and compared with the masked dense model in float64. Ends
with status 1 where one is further from it than rounding explains, or generates other tokens.
Given names of families, measures these alone and leaves other rows of the file as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from family_models import FORMS, KNOWN, family_name, layouts, make_dense
from vision_models import SEEING, make_seeing, picture

from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.common.disk import publish_file
from spp_export.common.errors import reason_of
from spp_export.evaluation.contract import (
    LIMIT,
    Distances,
    Pair,
    check,
    distances,
    exact_logits,
    load_exact,
    make_slim,
)
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import known_types

UNITS = ("query heads", "KV heads", "channels", "experts")
DISTANCES = ("logits", "cached", "padded", "again")
_COLUMNS = {
    "family": "`{family}`",
    "layers": "{layers}",
    "forms": "{forms}",
    "plans": "{plans}",
    "parameters kept": "{parameters_kept:.0%}",
    **{f"{unit} cut": f"{{{unit}}}" for unit in UNITS},
    "logits": "{logits:.0e}",
    "with a cache": "{cached:.0e}",
    "left-padded": "{padded:.0e}",
    "saved again": "{again:.0e}",
}
_PAGE = """\
# How exact is each family?

Written by `make families`, which ends with an error where a row does not hold.

A tiny random model of every family is sliced by a random plan in every layout, written, loaded, and
compared with the dense model with the same units masked, in float64. The last four columns are the
largest differences of logits of about 1, over all plans: of a prompt, of tokens that are generated
with a cache, of both where a row begins with padding, and of a prompt after the slim model was
saved and loaded again. Rounding explains {limit:g}. A family has a model for each of its forms, as
OPT-350m is one of OPT; layers are those of the first, units and parameters are summed over all
plans, channels of experts in the parameters alone. Names such as `llava` are of models that see:
their prompt is compared with a picture in it and without.

{count} families, of which {held} hold, with transformers {transformers} and torch {torch}; the
largest difference is {worst:.0e}.

"""


def measured(name: str, place: Path) -> dict[str, Any]:
    """The row of a family; under `failed` the first thing that does not hold."""
    sees = name in SEEING
    forms = [name, *(form for form in FORMS if family_name(form) == name)]
    totals = {unit: [0, 0] for unit in ("parameters", *UNITS)}
    row: dict[str, Any] = {"family": name, "forms": len(forms), "plans": 0}
    found: list[Distances] = []
    for form in forms:
        source = open_source((make_seeing if sees else make_dense)(form, place / form / "dense"))
        row.setdefault("layers", source.shape.num_layers)
        for layout in layouts(source.family):
            row["plans"] += 1
            try:
                pair = make_slim(source, layout, place / form / layout)
                _count(pair, totals)
                check(pair)
                found.append(_apart(pair, name, place / form / f"{layout}-again"))
            except Exception as error:  # a wrong slice can fail anywhere in foreign classes
                row.setdefault("failed", f"{form}, {layout}: {reason_of(error)}")
    kept, of = totals.pop("parameters")
    row["parameters_kept"] = round(kept / of, 4) if of else 0.0
    row |= {unit: f"{of - kept} of {of}" for unit, (kept, of) in totals.items() if of}
    row |= {key: max((asdict(one)[key] for one in found), default=None) for key in DISTANCES}
    if not all(one <= LIMIT for plan in found for one in asdict(plan).values()):
        row.setdefault("failed", f"a difference above {LIMIT:g}")
    return row


def _apart(pair: Pair, name: str, folder: Path) -> Distances:
    apart = distances(pair, folder)
    if name not in SEEING:
        return apart
    slim = load_exact(pair.slim)
    with pair.masked() as masked:
        inputs = picture(name, masked)
        expected = exact_logits(masked, **inputs)
    seen = (exact_logits(slim, **inputs) - expected).abs().max()
    return replace(apart, logits=float(torch.stack([seen, torch.tensor(apart.logits)]).max()))


def _count(pair: Pair, totals: dict[str, list[int]]) -> None:
    """Add what a plan keeps, and what there was."""
    shape = pair.source.shape
    for index, layers in enumerate((pair.plan.layer_shapes(shape), shape.layers)):
        totals["parameters"][index] += shape.parameters(layers)
        totals["query heads"][index] += sum(layer.query_heads for layer in layers)
        totals["KV heads"][index] += sum(layer.kv_heads for layer in layers)
        totals["experts"][index] += sum(shape.experts_in(layers))
        if pair.source.family.down:  # others have no channels that go
            totals["channels"][index] += sum(layer.channels for layer in layers)


def page(document: Mapping[str, Any]) -> str:
    """A page of Markdown."""
    rows = [{**dict.fromkeys(UNITS, ""), **row} for row in document["rows"]]
    facts = {
        **document["machine"],
        "count": len(rows),
        "held": sum("failed" not in row for row in rows),
        "limit": document["limit"],
        "worst": max(row[key] for row in rows for key in DISTANCES),
    }
    lines = [list(_COLUMNS), ["---", *["--:"] * (len(_COLUMNS) - 1)]]
    lines += [[form.format_map(row) for form in _COLUMNS.values()] for row in rows]
    return _PAGE.format_map(facts) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write what was asked for."""
    made = parser(__doc__, writes=True)
    made.add_argument("family", nargs="*", help="families to measure; all without")
    made.add_argument("--page", type=Path, help="page of documentation to write")
    options = made.parse_args(arguments)
    every = [*KNOWN, *(name for name in SEEING if name not in KNOWN)]
    if missing := sorted(set(options.family or known_types()) - set(every)):
        made.error(f"no tiny model of {', '.join(missing)}")
    rows: dict[str, Any] = {}
    if options.family and options.json and options.json.exists():
        rows = {row["family"]: row for row in json.loads(options.json.read_text())["rows"]}
    for name in options.family or every:
        with scratch(options) as place:
            rows[name] = measured(name, place)
        print(f"{name}: {rows[name].get('failed', 'holds')}", flush=True)
    found = [rows[name] for name in every if name in rows]
    failed = [f"{row['family']}: {row['failed']}" for row in found if "failed" in row]
    document = {"machine": machine(), "limit": LIMIT, "rows": found}
    finish(options, document, "", table(_COLUMNS, found), *failed)
    if options.page:
        publish_file(options.page, page(document), force=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
