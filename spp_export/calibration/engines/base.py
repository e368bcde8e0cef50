"""What an engine that answers prompts is asked, and what it has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from spp_export.models.checkpoint.checkpoint import Checkpoint


class EngineFailed(Exception):
    """An engine could not answer, in one line; another one may."""


class Dense(Protocol):
    """A model, its tokenizer, its files, the dtype that it computes in and the device, "cpu" or
    "cuda:1"."""

    @property
    def source(self) -> Checkpoint: ...
    @property
    def reader(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Prompts:
    """What is to be answered.

    questions  token ids up to where an answer begins
    tokens     of the longest answer
    seed       of all that is drawn
    sampling   temperature, top_p and top_k (0: of all tokens)
    stop       tokens that end an answer
    """

    questions: Sequence[tuple[int, ...]]
    tokens: int
    seed: int
    sampling: dict[str, Any]
    stop: tuple[int, ...]

    def ended(self, said: Sequence[int]) -> list[int]:
        """An answer up to the token that ends it."""
        ends = next((place + 1 for place, id_ in enumerate(said) if id_ in self.stop), len(said))
        return list(said[: min(ends, self.tokens)])


class AnswerEngine(Protocol):
    """An engine. `version` names it in the key of the cache: another engine draws other answers,
    and a change of how this one does must not meet those of before."""

    version: str

    def suits(self, dense: Dense, prompts: Prompts) -> bool:
        """Whether it is installed, runs where the model does, and is worth starting for these."""

    def answers(self, dense: Dense, prompts: Prompts) -> list[list[int]]:
        """The answer to each question, with progress. Raises EngineFailed."""
