"""`spp recover`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import RecoverRequest
from spp_export.common.options import non_default


@command(RecoverRequest)
def recover(request: RecoverRequest, out: Output) -> None:
    """Train an export to answer as the dense model does, and write the result.

    The dense model answers the prompts of --data. Each layer that was cut learns to write what the
    dense one does, and then the whole export learns how likely the dense model found every token;
    --learn text learns a text itself. The result has the layout of OUT and is checked as an export
    is. It is published only where it is nearer to the dense model than OUT on prompts that
    it was not trained on. An interrupted run goes on where it was. Adapters need the extra recover;
    'spp doctor' says how to install it.

    Example: spp recover out/chemistry --data chemistry.jsonl --steps 200 -o out/recovered
    """
    import spp_export

    result = spp_export.recover(**non_default(request))

    from spp_cli.render.summary import recover_summary

    out.result(result.to_dict, lambda look: recover_summary(result, look), brief=str(result.path))
    out.hint(command_line("chat", result.path, prompt="..."))
