"""Graphs of any exporter, run with the inputs they name: caches that grow, or that are shared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from spp_bench.cases import Ids
from spp_bench.clocks import wall_clock

Logits = NDArray[np.float32]
LOGITS = "logits"
_PREFIX = re.compile(r"^(?:input\.|output\.)?(?:past_key_values\.|present\.)")


def open_sessions(paths: list[Path], threads: int) -> list[ort.InferenceSession]:
    """A session for each graph, all with the same settings."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come back as exceptions
    # Otherwise its threads would keep a core busy while the next runner is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return [
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths
    ]


def caches(values: list[Any]) -> dict[str, Any]:
    """Inputs or outputs of a session that are caches, by the part of the name that past and
    present share."""
    return {
        _PREFIX.sub("", value.name): value
        for value in values
        if len(value.shape) == 4 and value.name != LOGITS
    }


class _Graph:
    """What both kinds of cache share: the inputs that are not caches."""

    clock = staticmethod(wall_clock)

    def __init__(self, name: str) -> None:
        self.name = name
        self._length = 0
        self._logits: Any = None

    def reserve(self, length: int) -> None:
        """Nothing: the cache grows, or has its room."""

    def forget(self) -> None:
        """Nothing: prefill begins anew."""

    def _bind_tokens(
        self, session: ort.InferenceSession, binding: Any, ids: Ids, past: int
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
        """Of the tokens fed by the last call, [1,S,V]."""
        return np.array(self._logits.numpy())


class GrowingRunner(_Graph):
    """Every call returns a new copy of the whole cache, which the next call takes.

    `sessions`: one graph for everything, or one for the prompt and one for the next token.
    """

    def __init__(self, name: str, sessions: list[ort.InferenceSession]) -> None:
        super().__init__(name)
        self._prompt, self._next = sessions[0], sessions[-1]
        self._cache: dict[str, Any] = {}

    def prefill(self, ids: Ids) -> None:
        """Begin anew with a prompt [1,S]."""
        self._cache = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                [1, int(value.shape[1]), 0, int(value.shape[3])], np.float32
            )
            for name, value in caches(self._prompt.get_inputs()).items()
        }
        self._run(self._prompt, ids, 0)

    def decode(self, ids: Ids) -> None:
        """A step for each column of [1,N]."""
        for column in ids.T:
            self._run(self._next, column[:, None], self._length)

    def _run(self, session: ort.InferenceSession, ids: Ids, past: int) -> None:
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

    def __init__(self, name: str, session: ort.InferenceSession, capacity: int) -> None:
        super().__init__(name)
        self._session, self._binding = session, session.io_binding()
        presents = caches(session.get_outputs())
        self._buffers = []
        for name, value in caches(session.get_inputs()).items():
            shape = [1, int(value.shape[1]), capacity, int(value.shape[3])]
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self._binding.bind_ortvalue_input(value.name, buffer)
            self._binding.bind_ortvalue_output(presents[name].name, buffer)
            self._buffers.append(buffer)

    def prefill(self, ids: Ids) -> None:
        """Begin anew with a prompt [1,S]."""
        self._run(ids, 0)

    def decode(self, ids: Ids) -> None:
        """A step for each column of [1,N]."""
        for column in ids.T:
            self._run(column[:, None], self._length)

    def _run(self, ids: Ids, past: int) -> None:
        self._bind_tokens(self._session, self._binding, ids, past)
        self._session.run_with_iobinding(self._binding)
        self._logits = self._binding.get_outputs()[-1]
