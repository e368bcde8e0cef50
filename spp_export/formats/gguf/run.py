"""A GGUF file that continues texts in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import UsageError
from spp_export.common.installation import install_command
from spp_export.formats.format import Feed
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.llama_cpp import LlamaCpp, is_installed

# Tokens that llama.cpp tells the probabilities of.
_LIKELIEST = 512


class LlamaModel:
    """A GGUF file in llama.cpp, whose likeliest tokens alone have a probability."""

    runtime = "llama.cpp"

    def __init__(self, path: Path, threads: int | None) -> None:
        metadata = read_gguf(path.parent).metadata
        architecture = metadata["general.architecture"].items
        context = metadata[f"{architecture}.context_length"].items
        tokens = metadata["tokenizer.ggml.tokens"].items
        assert isinstance(context, int)
        assert isinstance(tokens, tuple)
        self.context_length = context
        self._vocabulary = len(tokens)
        self._path, self._threads = path, threads
        self._running: LlamaCpp | None = None
        self._capacity = 0

    def start(self, capacity: int) -> Feed:
        """A new sequence. What is loaded serves the next one too, where it has room for it."""
        running, read = self._with_room(capacity), list[int]()

        def feed(ids: Sequence[int]) -> NDArray[Any]:
            read.extend(ids)
            likeliest = running.generate(read, 1, min(_LIKELIEST, self._vocabulary))[0].likeliest
            logits = np.full(self._vocabulary, -np.inf, np.float32)
            for token, value in likeliest:
                logits[token] = value
            return logits

        return feed

    def tokenize(self, text: str, *, around: bool, capacity: int) -> list[int]:
        """Ids of a text by the file's own tokenizer, as for all other users of llama.cpp."""
        return self._with_room(capacity).tokenize([text], around=around)[0]

    def _with_room(self, capacity: int) -> LlamaCpp:
        if self._running is None or capacity > self._capacity:
            if self._running:
                self._running.close()
            self._running, self._capacity = LlamaCpp(self._path, capacity, self._threads), capacity
        return self._running


def load_gguf(path: Path, device: str, dtype: str | None, threads: int | None) -> LlamaModel:
    """The model in a file. Raises UsageError where it cannot be run here."""
    if dtype is not None:
        raise UsageError(
            f"--dtype {dtype}: how {path} stores its weights was chosen when it was exported. "
            "Drop --dtype."
        )
    if device not in ("cpu", "auto"):
        raise UsageError(f"--device {device}: GGUF runs on the CPU here. Drop --device.")
    if not is_installed():
        raise UsageError(
            f"{path}: 'spp chat' needs the package xllamacpp. Run: {install_command('gguf')} or "
            "talk to it with llama.cpp's llama-cli -m."
        )
    return LlamaModel(path, threads)
