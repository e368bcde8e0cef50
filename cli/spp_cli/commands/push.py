"""`spp push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output


def push(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A directory written by 'spp export' or 'spp convert'."),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="ID", help="Repository, as org/name; made if there is none.")
    ],
    private: options.Private = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            rich_help_panel=options.PUBLISHING,
            help="Branch to write to, made if there is none; main by default.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified",
            rich_help_panel=options.DANGEROUS,
            help="Push even what was not checked, or did not pass; its card says so.",
        ),
    ] = False,
) -> None:
    """Upload an export to the Hugging Face Hub, only as it was written and checked.

    The token is HF_TOKEN, or that of 'hf auth login'.

    Example: spp push out/chemistry my-name/chemistry --private
    """
    import spp_export

    shown = Output(json=json, quiet=quiet)
    result = spp_export.push_to_hub(
        out,
        repo_id,
        private=private,
        revision=revision,
        allow_unverified=unverified,
    )

    from rich.text import Text

    from spp_cli.units import byte_size

    said = f"{result.files} files, {byte_size(result.bytes)}, pushed to {result.url}"
    shown.result(result.to_dict, lambda _: Text(said), brief=result.url)
