"""A directory's tokenizer, its files checked before transformers sees them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import read_config
from spp_export.models.checkpoint.companions import check_companions

# What transformers says of a directory with none of these depends on its version.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_WHOLE = "tokenizer.json"


def load_tokenizer(directory: Path, *, name: str | None = None, without_torch: bool = False) -> Any:
    """The tokenizer in a model directory; no code of its own is run, nothing is fetched.

    `name` is what messages call the model. `without_torch` reads a tokenizer.json as it is, as
    every runtime but transformers does, and leaves torch alone.

    Raises ModelError where there is none that can be loaded.
    """
    import transformers

    shown = name or os.fspath(directory)
    read_config(directory)
    check_companions(directory)
    if not any((directory / file).exists() for file in _FILES):
        raise ModelError(
            f"{shown}: no tokenizer that transformers can load: expected one of "
            f"{', '.join(_FILES)} beside config.json."
        )
    plain = without_torch and (directory / _WHOLE).is_file()
    # By name: AutoTokenizer imports torch.
    kind = getattr(transformers, "PreTrainedTokenizerFast" if plain else "AutoTokenizer")
    try:
        with quiet_transformers():
            # Without the word it would ask on the terminal, and take a scenario's "y" for a yes.
            return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a damaged file can fail anywhere below
        # What the tokenizers library panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{shown}: no tokenizer that transformers can load: {first:.300}"
        ) from error
