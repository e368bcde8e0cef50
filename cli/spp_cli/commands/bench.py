"""`spp bench`."""

from __future__ import annotations

import typer

from spp_bench.requests import BenchOptions
from spp_cli.options import command
from spp_cli.output import Output, write_error
from spp_export.common.options import non_default


@command(BenchOptions)
def bench(request: BenchOptions, out: Output) -> None:
    """Measure speed and memory of exports beside the dense model, with the bound on every gain.

    Parity comes first: there are no figures of a model that fails it. The exit status is 1 where
    it fails, where a speed-up is above its bound, and where memory is not what the plan predicts.

    Example: spp bench out/chemistry --context 128 --context 1024 -o bench.json
    """
    import spp_export

    document = spp_export.bench(**non_default(request))

    from spp_cli.render.benchmark import benchmark_report, profile_report

    if request.profile:
        out.result(
            lambda: document, lambda look: profile_report(document), brief=str(request.output)
        )
        return
    out.result(lambda: document, lambda look: benchmark_report(document))
    for problem in document["problems"]:
        write_error(problem)
    if document["problems"]:
        raise typer.Exit(1)
