"""Ways to run a prompt and the tokens after it: PyTorch, graphs with growing or shared caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]
LOGITS = "logits"
_PREFIX = re.compile(r"^(?:input\.|output\.)?(?:past_key_values\.|present\.)")


class Runner(Protocol):
    """Decodes one sequence. `logits` copies what the last call computed, [1, S, V]."""

    def prefill(self, ids: Tokens) -> None:
        """Forget everything and take a prompt [1, S]."""

    def decode(self, ids: Tokens) -> None:
        """Take the next token [1, 1]."""

    def logits(self) -> Logits:
        """Of the tokens taken last."""


class TorchRunner:
    """The slim model in PyTorch, as transformers runs it with scaled_dot_product_attention."""

    def __init__(self, slim: Path, threads: int) -> None:
        import torch

        from spp_export.models.loader import load_slim

        torch.set_num_threads(threads)
        self._torch, self._past, self._logits = torch, None, None
        self._model: Any = load_slim(slim, dtype=torch.float32, attn_implementation="sdpa")

    def prefill(self, ids: Tokens) -> None:
        """See Runner."""
        self._past = None
        self.decode(ids)

    def decode(self, ids: Tokens) -> None:
        """See Runner."""
        with self._torch.no_grad():
            out = self._model(
                input_ids=self._torch.from_numpy(ids),
                past_key_values=self._past,
                use_cache=True,
            )
        self._past, self._logits = out.past_key_values, out.logits

    def logits(self) -> Logits:
        """See Runner."""
        assert self._logits is not None
        return np.array(self._logits.numpy())


def open_sessions(paths: list[Path], threads: int) -> list[ort.InferenceSession]:
    """A session for each graph, all with the same settings."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come back as exceptions
    # Or its threads would keep a core busy while the next one in turn is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return [
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths
    ]


def caches(values: list[Any]) -> dict[str, Any]:
    """Inputs or outputs of a session that are caches, by what past and present have in common."""
    return {
        _PREFIX.sub("", value.name): value
        for value in values
        if len(value.shape) == 4 and value.name != LOGITS
    }


class _Graph:
    """What both kinds of cache share: the inputs that are no cache."""

    def __init__(self) -> None:
        self._length = 0
        self._logits: Any = None

    def _bind_tokens(
        self, session: ort.InferenceSession, binding: Any, ids: Tokens, past: int
    ) -> None:
        rows, new = ids.shape
        known = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, past + new), np.int64),
            "position_ids": np.tile(np.arange(past, past + new), (rows, 1)),
        }
        for value in session.get_inputs():
            if len(value.shape) != 4:
                binding.bind_cpu_input(value.name, known[value.name])
        binding.bind_output(LOGITS, "cpu")
        self._length = past + new

    def logits(self) -> Logits:
        """See Runner."""
        return np.array(self._logits.numpy())


class GrowingRunner(_Graph):
    """Every call returns the whole cache anew, and the next one takes it.

    `sessions`: one graph for everything, or the prompt's and the next token's.
    """

    def __init__(self, sessions: list[ort.InferenceSession]) -> None:
        super().__init__()
        self._prompt, self._next = sessions[0], sessions[-1]
        self._cache: dict[str, Any] = {}

    def prefill(self, ids: Tokens) -> None:
        """See Runner."""
        self._cache = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                [1, int(value.shape[1]), 0, int(value.shape[3])], np.float32
            )
            for name, value in caches(self._prompt.get_inputs()).items()
        }
        self._run(self._prompt, ids, 0)

    def decode(self, ids: Tokens) -> None:
        """See Runner."""
        self._run(self._next, ids, self._length)

    def _run(self, session: ort.InferenceSession, ids: Tokens, past: int) -> None:
        binding = session.io_binding()
        self._bind_tokens(session, binding, ids, past)
        for name, value in caches(session.get_inputs()).items():
            binding.bind_ortvalue_input(value.name, self._cache[name])
        presents = caches(session.get_outputs())
        for value in presents.values():
            binding.bind_output(value.name, "cpu")
        session.run_with_iobinding(binding)
        self._logits, *new = binding.get_outputs()
        self._cache = dict(zip(presents, new, strict=True))


class SharedRunner(_Graph):
    """Past and present are the same buffers of `capacity` tokens, bound once."""

    def __init__(self, session: ort.InferenceSession, capacity: int) -> None:
        super().__init__()
        self._session, self._binding = session, session.io_binding()
        presents = caches(session.get_outputs())
        self._buffers = []
        for name, value in caches(session.get_inputs()).items():
            shape = [1, int(value.shape[1]), capacity, int(value.shape[3])]
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self._binding.bind_ortvalue_input(value.name, buffer)
            self._binding.bind_ortvalue_output(presents[name].name, buffer)
            self._buffers.append(buffer)

    def prefill(self, ids: Tokens) -> None:
        """See Runner."""
        self._run(ids, 0)

    def decode(self, ids: Tokens) -> None:
        """See Runner."""
        self._run(ids, self._length)

    def _run(self, ids: Tokens, past: int) -> None:
        self._bind_tokens(self._session, self._binding, ids, past)
        self._session.run_with_iobinding(self._binding)
        self._logits = self._binding.get_outputs()[-1]
