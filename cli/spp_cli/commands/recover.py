"""`spp recover`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import RecoverRequest
from spp_export.common.options import non_default


@command(RecoverRequest)
def recover(request: RecoverRequest, out: Output) -> None:
    """Train an export for a few steps with LoRA, and write the merged model.

    The result has the layout of OUT and is checked as an export is. It is published only where it
    predicts text that it was not trained on better than OUT. An interrupted run goes on where it
    was. Needs the extra recover; 'spp doctor' says how to install it.

    Example: spp recover out/chemistry --data chemistry.jsonl --steps 200 -o out/recovered
    """
    import spp_export

    result = spp_export.recover(**non_default(request))

    from spp_cli.render.summary import recover_summary

    out.result(result.to_dict, lambda look: recover_summary(result, look), brief=str(result.path))
    out.hint(command_line("chat", result.path, prompt="..."))
