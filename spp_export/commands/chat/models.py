"""A model as `chat` uses it, whatever runs it: tokens in, logits of the last one out, with a cache.

Only the module of the runtime that is asked for gets imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spp_export.formats.gguf.llama_cpp import LlamaCpp
    from spp_export.formats.onnx.runtime import OrtModel

# Takes in tokens after those it has taken in before, and gives the logits [V] after the last.
Feed = Callable[[Sequence[int]], NDArray[Any]]

# Room that is reserved at once for a growing conversation.
_CAPACITY_STEP = 512
# Tokens of a prompt that a graph takes in at once.
_CHUNK = 256
# Tokens that llama.cpp tells the probabilities of.
_LIKELIEST = 512


class ChatModel(Protocol):
    """A causal language model that continues one sequence at a time."""

    @property
    def runtime(self) -> str:
        """What runs it."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""

    def start(self, capacity: int) -> Feed:
        """A new sequence, of at most `capacity` tokens."""


class TorchModel:
    """A transformers model in evaluation mode."""

    runtime = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    @property
    def context_length(self) -> int:
        """Positions that the model's config knows."""
        return int(self._model.config.max_position_embeddings)

    def start(self, capacity: int) -> Feed:
        """A new sequence; the cache grows by itself, whatever the capacity."""
        import torch

        from spp_export.calibration.activations import input_device

        device = input_device(self._model)
        cache = None

        @torch.no_grad()
        def feed(ids: Sequence[int]) -> NDArray[Any]:
            nonlocal cache
            output = self._model(
                input_ids=torch.tensor([list(ids)], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits: NDArray[Any] = output.logits[0, -1].float().cpu().numpy()
            return logits

        return feed


class OnnxModel:
    """A model of ONNX Runtime."""

    runtime = "onnxruntime"

    def __init__(self, model: OrtModel) -> None:
        self._model = model

    @property
    def context_length(self) -> int:
        """Positions that the graph's rotary tables hold."""
        return self._model.context_length

    def start(self, capacity: int) -> Feed:
        """A new sequence, whose cache may be allocated at once."""
        decoding = self._model.start(1, capacity)

        def feed(ids: Sequence[int]) -> NDArray[Any]:
            # In parts, for the graph gives the logits of every token.
            for start in range(0, len(ids), _CHUNK):
                logits = decoding.feed([list(ids[start : start + _CHUNK])])
            last: NDArray[Any] = logits[0, -1]
            return last

        return feed


class LlamaModel:
    """A GGUF file in llama.cpp, whose likeliest tokens alone have a probability."""

    runtime = "llama.cpp"

    def __init__(self, path: Path, threads: int | None) -> None:
        from spp_export.formats.gguf.header import read_gguf

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
        from spp_export.formats.gguf.llama_cpp import LlamaCpp

        if self._running is None or capacity > self._capacity:
            if self._running:
                self._running.close()
            self._running, self._capacity = LlamaCpp(self._path, capacity, self._threads), capacity
        running, read = self._running, list[int]()

        def feed(ids: Sequence[int]) -> NDArray[Any]:
            read.extend(ids)
            likeliest = running.generate(read, 1, min(_LIKELIEST, self._vocabulary))[0].likeliest
            logits = np.full(self._vocabulary, -np.inf, np.float32)
            for token, value in likeliest:
                logits[token] = value
            return logits

        return feed


class Reader:
    """Reads prompts into a model's cache, and only the new part of one that goes on from there."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self._feed: Feed | None = None
        self._capacity = 0
        self._read: list[int] = []

    def prompt(self, ids: Sequence[int], new_tokens: int) -> NDArray[Any]:
        """Logits [V] after a whole prompt that at most `new_tokens` tokens will follow."""
        needed = len(ids) + new_tokens
        known = len(self._read)
        goes_on = list(ids[:known]) == self._read and known < len(ids)
        if self._feed is None or not goes_on or needed > self._capacity:
            self.forget()
            steps = -(-needed // _CAPACITY_STEP)
            self._capacity = min(steps * _CAPACITY_STEP, self._model.context_length)
            self._feed = self._model.start(self._capacity)
        return self.more(ids[len(self._read) :])

    def more(self, ids: Sequence[int]) -> NDArray[Any]:
        """Logits [V] after these further tokens."""
        assert self._feed is not None
        logits = self._feed(ids)
        self._read += ids
        if np.isnan(logits.max()):
            self.forget()
            raise ModelError(
                "the model's logits are not numbers: its values leave the range of the precision "
                "it runs in. Use --dtype float32, or export to ONNX in fp32."
            )
        return logits

    def forget(self) -> None:
        """Give the cache up; also where a step was interrupted and left it half written."""
        self._feed, self._read = None, []


def load_chat_model(
    directory: Path, *, device: str, dtype: str | None, threads: int | None
) -> ChatModel:
    """The model in a directory, on the runtime that its files are for.

    Raises UsageError where there is no model that can be run here.
    """
    if (directory / "model.onnx").is_file():
        return _load_onnx(directory, device, dtype, threads)
    if any(directory.glob("*.safetensors")):
        return _load_torch(directory, device, dtype, threads)
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs:
        return _load_gguf(ggufs[0], device, dtype, threads)
    raise UsageError(
        f"{directory}: holds no model; expected model.onnx, model.gguf or *.safetensors. Give a "
        "directory that 'spp export' wrote, or a dense model's."
    )


def gguf_refused(path: Path) -> UsageError:
    """The error for a file outside of a directory that spp wrote."""
    return UsageError(
        f"{path}: of GGUF files 'spp chat' runs the directories that spp wrote. "
        "Talk to others with llama.cpp's llama-cli -m."
    )


def _load_gguf(path: Path, device: str, dtype: str | None, threads: int | None) -> ChatModel:
    from spp_export.formats.gguf.format import gguf_options
    from spp_export.formats.gguf.llama_cpp import is_installed
    from spp_export.formats.gguf.options import INSTALL

    try:
        gguf_options(path.parent)
    except ModelError:
        raise gguf_refused(path) from None
    if dtype is not None:
        raise UsageError(
            f"--dtype {dtype}: how {path} stores its weights was chosen when it was exported. "
            "Drop --dtype."
        )
    if device not in ("cpu", "auto"):
        raise UsageError(f"--device {device}: GGUF runs on the CPU here. Drop --device.")
    if not is_installed():
        raise UsageError(
            f"{path}: 'spp chat' needs the package xllamacpp. Run: {INSTALL}, or talk to it with "
            "llama.cpp's llama-cli -m."
        )
    return LlamaModel(path, threads)


def _load_onnx(directory: Path, device: str, dtype: str | None, threads: int | None) -> ChatModel:
    if dtype is not None:
        raise UsageError(
            f"--dtype {dtype}: {directory} is an ONNX graph, whose precision was chosen when it "
            "was exported. Drop --dtype."
        )
    from spp_export.formats.onnx.runtime import OrtModel

    return OnnxModel(OrtModel.load(directory, device=device, threads=threads))


def _load_torch(directory: Path, device: str, dtype: str | None, threads: int | None) -> ChatModel:
    import torch

    from spp_export.models.loader import load_slim

    _check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype is None and device == "cpu":
        dtype = "float32"
    return TorchModel(load_slim(directory, dtype=dtype, device=device))


def _check_device(device: str) -> None:
    import torch

    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"--device {device}: expected cpu, cuda, cuda:1 or auto.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: PyTorch sees no CUDA card here. Use --device cpu.")
