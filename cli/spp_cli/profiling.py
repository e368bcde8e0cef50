"""`spp bench --profile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_cli.output import Output
from spp_export.common.errors import UsageError


def only(option: str, values: Sequence[int] | None, default: int) -> int:
    """The one value of a repeatable option: a table is of one cell."""
    found = list(values or (default,))
    if len(found) > 1:
        raise UsageError(f"{option}: a table is of one; got {', '.join(map(str, found))}.")
    return found[0]


def write_profile(
    out: Sequence[Path] | None,
    model: str,
    request: Mapping[str, Any],
    output: Path | None,
    force: bool,
    shown: Output,
    shape: str | None = None,
) -> None:
    """Time the blocks of a model, or of a published shape, and write the table."""
    if out:
        raise UsageError(f"{out[0]}: a table is of the dense model. Leave out the directories.")
    if output is None:
        raise UsageError("-o is missing: say where the table goes.")
    from spp_bench.profile import ProfileRequest, Target, profile

    target = Target.of_shape(shape) if shape else Target.of_model(model)
    document = profile(
        target,
        output,
        request=ProfileRequest(**request),
        force=force,
    )

    from spp_cli.render.benchmark import profile_report

    shown.result(lambda: document, lambda look: profile_report(document), brief=str(output))
