"""The formats, one line each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from spp_export.common.errors import UsageError
from spp_export.formats.format import Format, FormatOptions
from spp_export.formats.gguf.format import Gguf
from spp_export.formats.onnx.format import Onnx
from spp_export.formats.safetensors.format import Safetensors
from spp_export.models.shape import ModelShape

FORMATS: dict[str, Format[Any]] = {
    made.name: made
    for made in (
        Safetensors(),
        Onnx(),
        Gguf(),
    )
}


def format_of(options: FormatOptions) -> Format[Any]:
    """The format that these are options of."""
    return next(made for made in FORMATS.values() if made.options is type(options))


def detect_format(directory: Path, listed: Iterable[str] = ()) -> Format[Any] | None:
    """The format of what a directory holds, or should hold by the names `listed`."""
    names = [*os.listdir(directory), *listed] if directory.is_dir() else list(listed)
    marked = (made for made in FORMATS.values() if made.marker in names)
    holding = (made for made in FORMATS.values() if made.holds(names))
    return next(chain(marked, holding), None)


def options_of(
    name: str, device: str, values: Mapping[str, Any], shape: ModelShape | None = None
) -> FormatOptions:
    """The options of a format on a device, for models of a shape or any, by flag; None is no
    choice.

    Raises UsageError for a choice that the format does not have, or not for this shape.
    """
    record = FORMATS[name]
    chosen = {}
    for flag, value in values.items():
        if value is None:
            continue
        fields = {
            made.name: field
            for made in FORMATS.values()
            for field, known in made.options.flags().items()
            if known == flag
        }
        if name not in fields:
            titles = " and ".join(FORMATS[other].title for other in fields)
            raise UsageError(
                f"{flag}: is for {titles}. Add --format {' or '.join(fields)}, or drop {flag}."
            )
        choices = {
            other: FORMATS[other].options.choices().get(field, ())
            for other, field in fields.items()
        }
        known = ", ".join(choices[name])
        if known and value not in choices[name]:
            if any(value in words for words in choices.values()):
                raise UsageError(
                    f"{flag} {value}: --format {name} has {known}. Choose one of them."
                )
            raise UsageError(f"{flag} {value!s:.40}: expected one of {known}.")
        chosen[fields[name]] = value
    options: FormatOptions = record.options.chosen(device, chosen, shape)
    return options
