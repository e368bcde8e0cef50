"""`spp eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from spp_cli.options import command
from spp_cli.output import Output, write_warning
from spp_export.commands.requests import EvalTexts, EvaluateScenariosRequest
from spp_export.common.options import non_default


@dataclass(frozen=True)
class Evaluation(EvaluateScenariosRequest):
    """An evaluation with the repository's baselines among its criteria."""

    def check(self) -> None:
        """As of the request, once the baselines are known."""
        register_baselines(self.criterion)
        super().check()


@command(Evaluation)
def evaluate(request: Evaluation, out: Output) -> None:
    """Measure scenario-specific models on held-out text, beside baselines and controls.

    Also measured: the dense model in bf16, int8 and int4, and how far greedy answers agree with the
    dense model's. Writes results.jsonl, table.md and curves.png. Interrupted, it goes on where it
    was.

    Example: spp eval --scenario chemistry.txt --wrong history.txt -o results
    """
    import spp_export
    from spp_cli.render.evaluation import evaluation_report, evaluation_reports

    options, output = non_default(request, EvalTexts), request.output
    if len(request.scenario) == 1:
        result = spp_export.evaluate(request.scenario[0], output, **options)
        out.result(
            result.to_dict,
            lambda look: evaluation_report(result, look),
            brief=str(result.directory),
        )
        if not request.wrong:
            out.hint("add --wrong FILE, for the control that chooses by another scenario")
        return
    results = spp_export.evaluate_scenarios(request.scenario, output, **options)
    out.result(
        lambda: {"evaluations": [result.to_dict() for result in results]},
        lambda look: evaluation_reports(results, look),
        brief=str(output),
    )


def register_baselines(criteria: Sequence[str]) -> None:
    """Let the repository's benchmarks, where they are importable, add theirs to the criteria."""
    if find_spec("spp_campaigns") is not None:
        import spp_campaigns.probe_pruning  # noqa: F401
    elif "all" in criteria:
        write_warning("probe-pruning and full-batch-probing are left out: they need a clone of spp")
