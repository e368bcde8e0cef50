"""`spp convert`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import ConvertRequest
from spp_export.common.options import non_default


@command(ConvertRequest)
def convert(request: ConvertRequest, out: Output) -> None:
    """Write an existing checkpoint, slim or dense, as ONNX or GGUF.

    Example: spp convert out/chemistry -o out/chemistry-onnx --scenario chemistry.txt
    """
    import spp_export

    result = spp_export.convert(**non_default(request))

    from spp_cli.render.summary import convert_summary

    out.result(result.to_dict, lambda look: convert_summary(result, look), brief=str(result.path))
    out.hint(command_line("chat", result.path, prompt="..."))
