"""`spp push`."""

from __future__ import annotations

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.commands.requests import PushRequest
from spp_export.common.options import non_default


@command(PushRequest)
def push(request: PushRequest, out: Output) -> None:
    """Upload an export to the Hugging Face Hub, only as it was written and checked.

    The token is HF_TOKEN, or that of 'hf auth login'.

    Example: spp push out/chemistry my-name/chemistry --private
    """
    import spp_export

    result = spp_export.push_to_hub(**non_default(request))

    from rich.text import Text

    from spp_cli.render.look import byte_size

    line = f"{result.files} files, {byte_size(result.bytes)}, pushed to {result.url}"
    out.result(result.to_dict, lambda _: Text(line), brief=result.url)
