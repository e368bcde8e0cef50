"""The files beside a model's weights and config, which other libraries read as they are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import dump_json, json_object, read_json
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.checkpoint.reader import model_file

# The largest tokenizers have some thirty megabytes.
MAX_COMPANION_BYTES = 64 << 20
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What makes numbers of pictures, beside a model that sees.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# The key under which settings name code.
_CODE = "auto_map"
# Read by Python's own parser, in which deep nesting ends a process. tokenizer.json is not: it has
# a million items where a vocabulary is large, and its own reader has limits.
_OBJECTS = (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    *PROCESSOR_FILES,
)
# Old models carry it, and nothing opens it.
_UNUSED = "special_tokens_map_file"
_TEMPLATES = "additional_chat_templates"
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)


def companion(directory: Path, name: str) -> Path | None:
    """The file `name` of a model directory; None where there is none.

    Raises ModelError for what is no regular file of the directory, or larger than 64 MiB.
    """
    if not os.path.lexists(directory / name):
        return None
    path = model_file(directory, name)
    size = path.stat().st_size
    if not size and path.suffix in (".json", ".model"):
        raise ModelError(f"{directory / name}: is empty. Fetch the model again.")
    if size > MAX_COMPANION_BYTES:
        raise ModelError(
            f"{directory / name}: has {size} bytes, at most {MAX_COMPANION_BYTES} are read. "
            "Fetch the model again."
        )
    return path


def terms(directory: Path) -> tuple[str, ...]:
    """Names of the files with a model's terms of use: whoever passes it on has to pass them on."""
    return tuple(sorted(name for name in os.listdir(directory) if _TERMS.fullmatch(name)))


def companion_object(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of a model directory; empty where there is none.

    Raises ModelError for what is none, and as of `companion`.
    """
    path = companion(directory, name)
    if path is None:
        return {}
    content = read_json(path, what=name, error=ModelError)
    return json_object(content, f"{directory / name}: the document", ModelError)


def copy_companions(directory: Path, names: Iterable[str], target: Path) -> None:
    """Copy those of the files that there are to the directory `target`. Errors as of `companion`;
    OSError where they cannot be written."""
    for name in names:
        if original := companion(directory, name):
            shutil.copyfile(original, target / name)


def copy_processor(directory: Path, target: Path) -> None:
    """Copy the settings of a model's processor, if it has any, without the code that they name:
    whoever trusts the code of an export must not run another's. Errors as of `copy_companions`."""
    for name in PROCESSOR_FILES:
        settings = companion_object(directory, name)
        plain = _without_code(settings)
        if plain == settings:
            copy_companions(directory, [name], target)
        else:
            (target / name).write_text(dump_json(plain), encoding="utf-8")


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != _CODE
    }


def check_companions(directory: Path) -> None:
    """ModelError unless all that transformers reads beside weights and config can be given to it:
    files of the directory itself, of sane size, and JSON that its parser survives."""
    for name in (*_OBJECTS, *TOKENIZER_FILES):
        path = companion(directory, name)
        if path and name in _OBJECTS:
            content = read_json(path, what=name, error=ModelError)
            place = f"{directory / name}: the document"
            settings = json_object(content, place, ModelError)
            if name == TOKENIZER_CONFIG:
                _check_settings(settings, directory)
    templates = directory / _TEMPLATES
    if os.path.lexists(templates):
        if templates.is_symlink() or not templates.is_dir():
            raise ModelError(f"{templates}: expected a directory. Remove it.")
        for name in os.listdir(templates):
            companion(templates, name)


def _check_settings(settings: dict[str, object], directory: Path) -> None:
    """Nothing in a tokenizer's settings may name a file: older transformers opens it wherever it
    is."""
    for key in settings:
        names = key.endswith(("_file", "_files")) and key != _UNUSED
        if names and settings[key] is not None:
            raise ModelError(
                f"{directory / TOKENIZER_CONFIG}: names a file in {key!r:.60}, and a tokenizer's "
                "files are those beside it. Remove the key."
            )
