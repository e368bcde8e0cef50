"""A directory's tokenizer: its files checked before transformers sees them, and written for every
engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError, reason_of
from spp_export.common.installation import install_command, require_package
from spp_export.common.json_files import dump_json
from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, read_config
from spp_export.models.checkpoint.companions import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    check_companions,
    companion_object,
    copy_companions,
)
from spp_export.models.families import decoder_settings, known_types, vocabulary_size
from spp_export.models.stop_tokens import generation_config

# What transformers says of a directory with none of these depends on its version.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_WHOLE = "tokenizer.json"
# Classes that read tokenizer.json as it is, by the names that transformers 4 and 5 give them.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# Without them there is tokenizer.model alone, which other packages read.
_READ_BY_THEMSELVES = tuple(name for name in _FILES if name != "tokenizer.model")
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


class ModelTokenizer:
    """A tokenizer of transformers beside a model: all of it, but ids that the model has no
    embedding for are a ModelError, whichever engine they were meant for.

    rows  tokens that the model has; a tokenizer may have more, which some texts never use. None
          beside a GGUF file, which has a token for each of them.
    """

    def __init__(self, tokenizer: Any, rows: int | None, name: str) -> None:
        self._tokenizer, self._rows, self._name = tokenizer, rows, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for them before there is a tokenizer
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        encoded = self._tokenizer(*texts, **options)
        self._check(encoded["input_ids"])
        return encoded

    def _check(self, ids: Any) -> None:
        if id_ := self._lacks(_flat(ids)):
            assert self._rows is not None
            token = str(self._tokenizer.convert_ids_to_tokens(id_))
            raise ModelError(
                f"{self._name}: the text has token {token!r:.60}, which is {id_} in the "
                f"tokenizer, and config.json gives the model vocab_size {self._rows}, so ids up to "
                f"{self._rows - 1}. Use the tokenizer that the model was trained with, or give the "
                "model its tokens: model.resize_token_embeddings(len(tokenizer))."
            )

    def _lacks(self, ids: Iterable[int]) -> int | None:
        """The highest id, where the model has no embedding for it."""
        highest = max(ids, default=0)
        return None if self._rows is None or highest < self._rows else highest


def _flat(ids: Any) -> Iterator[int]:
    """The ids of a text, or of a list of them."""
    for item in ids:
        if isinstance(item, int):
            yield item
        else:
            yield from _flat(item)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has the files of a tokenizer."""
    return any((directory / file).exists() for file in _FILES)


def load_tokenizer(
    directory: Path, *, name: str | None = None, without_torch: bool = False
) -> ModelTokenizer:
    """The tokenizer in a model directory; no code of its own is run, nothing is fetched.

    `name` is what messages call the model. `without_torch` reads a tokenizer.json as it is, as
    every runtime but transformers does, and leaves torch alone.

    Raises ModelError where there is none that can be loaded.
    """
    import transformers

    shown = name or os.fspath(directory)
    config = decoder_settings(read_config(directory))
    rows = vocabulary_size(config) if "vocab_size" in config else None
    check_companions(directory)
    if not has_tokenizer(directory):
        raise ModelError(
            f"{shown}: no tokenizer that transformers can load: expected one of "
            f"{', '.join(_FILES)} beside config.json."
        )
    if not any((directory / file).exists() for file in _READ_BY_THEMSELVES):
        for module, package in _SENTENCEPIECE.items():
            install = partial(install_command, package, extra=False)
            require_package(module, f"{shown}: tokenizer.model", install)
    plain = without_torch and (directory / _WHOLE).is_file()
    # By name: AutoTokenizer imports torch.
    kind = getattr(transformers, "PreTrainedTokenizerFast" if plain else "AutoTokenizer")
    try:
        with quiet_transformers():
            # Without the word it would ask on the terminal, and take a scenario's "y" for a yes.
            loaded = kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a damaged file can fail anywhere below
        # What the tokenizers library panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{shown}: no tokenizer that transformers can load: {reason_of(error)}"
        ) from error
    return ModelTokenizer(loaded, rows, shown)


def write_companions(
    directory: Path,
    target: Path,
    config: Mapping[str, Any],
    *,
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Write what engines read beside weights and config, from a model's directory to `target`.

    config   of `target`, by whose model type transformers chooses a tokenizer's class
    adapt    gives a format's tokenizer_config.json; both files of settings are written anew then

    Every engine finds a tokenizer.json, whatever the tokenizer consists of, and `generate` stops
    where `spp chat` does. Code that a tokenizer names is left out: whoever trusts an export's own
    code, as the card of a per-layer one says, would run that too. Raises ModelError for a tokenizer
    that cannot be loaded, OSError where `target` takes no files.
    """
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    generation = generation_config(directory, read_config(directory), tokenizer, config)
    if adapt and generation is None:
        generation = companion_object(directory, GENERATION_CONFIG)
    stored = companion_object(directory, TOKENIZER_CONFIG)
    settings = {key: value for key, value in stored.items() if key != "auto_map"}
    name = settings.get("tokenizer_class")
    stock = name and str(config.get("model_type")) in known_types()
    copied = [GENERATION_CONFIG, TOKENIZER_CONFIG, *TOKENIZER_FILES]
    as_it_is = (directory / _WHOLE).is_file() and (stock or name in _PLAIN)
    if getattr(tokenizer, "backend_tokenizer", None) is not None and not as_it_is:
        copied.remove(_WHOLE)
        _write_backend(tokenizer, target / _WHOLE)
        special = {key: str(token) for key in _NAMED if (token := getattr(tokenizer, key, None))}
        # The class that a model type has by default is unknown to other readers.
        settings = {**special, **settings, "tokenizer_class": name if stock else _PLAIN[0]}
    if adapt and settings:
        settings = adapt(settings)
    for file, content, anew in (
        (GENERATION_CONFIG, generation, bool(generation)),
        (TOKENIZER_CONFIG, settings, settings != stored or bool(adapt and settings)),
    ):
        if anew:
            copied.remove(file)
            (target / file).write_text(dump_json(content), encoding="utf-8")
    copy_companions(directory, copied, target)


def _write_backend(tokenizer: Any, path: Path) -> None:
    """tokenizer.json of a loaded tokenizer, which cuts and pads nothing."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    path.write_text(whole.to_str(pretty=True), encoding="utf-8")
