"""What a GGUF directory says of itself."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from spp_export.common.errors import ModelError, UsageError
from spp_export.formats.decoder import Decoder
from spp_export.formats.gguf.contents import Contents
from spp_export.formats.gguf.options import FILE_VERSION, GGUF_NAME, GgufOptions
from spp_export.models.checkpoint.source import read_config
from spp_export.planning import Plan

_KEY = "spp_gguf"


def is_gguf(directory: Path) -> bool:
    """Whether a directory holds a GGUF file of ours, or something of that name."""
    return (directory / GGUF_NAME).exists()


def gguf_config(decoder: Decoder, contents: Contents) -> dict[str, Any]:
    """config.json of a GGUF directory, which says how the file was written."""
    said = {
        "architecture": contents.architecture.name,
        **contents.options.to_dict(),
        "layout": decoder.layout,
        "version": FILE_VERSION,
    }
    family = decoder.family
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        _KEY: said,
    }


def gguf_options(directory: Path) -> GgufOptions:
    """The form of a directory's file, from its config.json.

    Raises ModelError where spp did not write it, or another version that would write it otherwise.
    """
    said = read_config(directory).get(_KEY)
    if not isinstance(said, dict) or not said.keys() >= {"precision", "quant"}:
        raise ModelError(
            f"{directory}: config.json has no {_KEY}, so the file was not written by spp."
        )
    if said.get("version") != FILE_VERSION:
        raise ModelError(
            f"{directory}: its GGUF is of version {said.get('version')!r:.20}, this spp checks "
            f"version {FILE_VERSION}. Write it again, or verify it with the spp that wrote it."
        )
    options = GgufOptions(said["precision"], said["quant"])
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: {_KEY} of config.json is malformed: {error}") from error
    if options == GgufOptions():
        raise ModelError(f"{directory}: {_KEY} of config.json names neither precision nor quant.")
    return options


def shown_name(compiled: Plan) -> str:
    """What programs that run the file call the model."""
    return f"{PurePosixPath(compiled.model_source).name} (spp)"
