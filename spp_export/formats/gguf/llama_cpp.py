"""A GGUF file in llama.cpp: greedy tokens and log-probabilities, by the package xllamacpp."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from spp_export.common.errors import ModelError
from spp_export.common.signals import Cleanup, held
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.values import Metadata

_PACKAGE = "xllamacpp"


@dataclass(frozen=True)
class Step:
    """One token that was generated, and the log-probabilities of the likeliest, best first."""

    token: int
    likeliest: tuple[tuple[int, float], ...]


def is_installed() -> bool:
    """Whether there is a llama.cpp to run files with."""
    return importlib.util.find_spec(_PACKAGE) is not None


def engine_name() -> str:
    """The package and its version."""
    return f"{_PACKAGE} {version(_PACKAGE)}"


class LlamaCpp:
    """A loaded file, in a process of its own, so that a crash of llama.cpp is an error here.

    To be closed; at the latest it is when nobody has it any more.
    """

    def __init__(
        self, path: Path, context: int, threads: int | None = None, **settings: int
    ) -> None:
        """With room for `context` tokens, and more settings of `llama_child.open_server`.

        ModelError where llama.cpp does not take the file.
        """
        metadata = read_gguf(path.parent).metadata
        self._path = path
        self._harmless = _harmless(metadata)
        self._requests = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with the rest
        # By its path: it needs nothing of this package, and starts the faster.
        child = Path(__file__).with_name("llama_child.py")
        chosen = json.dumps({"context": context, "threads": threads or 0, **settings})
        command = [sys.executable, "-P", str(child), str(path), chosen]
        with held():
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,  # Ctrl-C ends an answer, and not what gives it
            )
            log = self._log
            self._ending = Cleanup(lambda: _end(process, log))
        # Bytes that the process held before it loaded the file.
        self.empty_bytes: int = self._answer()["held"]

    @property
    def process_id(self) -> int:
        """Of the process that llama.cpp is in."""
        return self._process.pid

    def close(self) -> None:
        """End the process. May be called again."""
        self._ending.run()

    def generate(self, ids: Sequence[int], new_tokens: int, top: int) -> tuple[Step, ...]:
        """Greedy continuation of a sequence that is read as it is; the token that ends a text does
        not end it. `top` is how many tokens are told of at each step."""
        request = {"ids": list(ids), "new": new_tokens, "top": top, "harmless": self._harmless}
        steps = [tuple((int(i), float(p)) for i, p in step) for step in self._ask(request)["steps"]]
        return tuple(Step(step[0][0], step) for step in steps)

    def read(
        self, prompts: Sequence[Sequence[int]], new: int, *, afresh: bool
    ) -> Mapping[str, int]:
        """As `llama_child.read`."""
        done = self._ask({"prompts": [list(ids) for ids in prompts], "new": new, "afresh": afresh})
        return {name: int(done[name]) for name in ("cached", "read", "new")}

    def tokenize(self, texts: Sequence[str], *, around: bool) -> list[list[int]]:
        """Ids of texts by llama.cpp's own tokenizer, special tokens in them read as such.

        around: with the tokens that the file says begin and end a text
        """
        ids: list[list[int]] = self._ask({"texts": list(texts), "around": around})["tokens"]
        return ids

    def ends(self, tokens: Sequence[int]) -> list[bool]:
        """Whether llama.cpp stops at each of the tokens."""
        stops: list[bool] = self._ask({"ends": list(tokens), "harmless": self._harmless})["ends"]
        return stops

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._requests += 1
        request["number"] = self._requests
        with contextlib.suppress(BrokenPipeError):  # then there will be no answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = self._answer()
        if "error" in reply:
            raise ModelError(f"{self._path}: llama.cpp refuses these tokens: {reply['error']}.")
        return reply

    def _answer(self) -> dict[str, Any]:
        """The answer to the last question: one may have been left behind by an interruption.

        ModelError, with the last words of llama.cpp, where none comes.
        """
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            if answer["number"] == self._requests:
                return answer
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        errors = [line for line in lines if "error" in line.lower() or "ASSERT" in line]
        last = (errors or lines or ["no reason given"])[-1]
        raise ModelError(f"{self._path}: llama.cpp ended with status {status}: {last:.200}")


def _end(process: subprocess.Popen[str], log: IO[bytes]) -> None:
    process.kill()
    process.communicate()
    log.close()


def _harmless(metadata: Metadata) -> int:
    """A token that is whole characters by itself."""
    entry = metadata.get("tokenizer.ggml.tokens")
    tokens = entry.items if entry and isinstance(entry.items, tuple) else ()
    words = (i for i, token in enumerate(tokens) if str(token).isascii() and str(token).isalnum())
    return next(words, 0)
