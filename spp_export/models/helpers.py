"""Other ranks that hold the same model, or parts of it, and read their share of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from spp_export.common import processes

if TYPE_CHECKING:
    from torch import Tensor, nn

_HELPERS = "spp_helpers"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Helpers:
    """The ranks that work with this one on what a model reads.

    opening: how they open the model; None where there are none
    in_parts: whether each has a part of every layer; they then read the same text, and rank 0 takes
    down what all have read
    """

    opening: Mapping[str, Any] | None = None
    in_parts: bool = False

    @property
    def takes(self) -> bool:
        """Whether this rank takes down what it reads."""
        return not (self.in_parts and processes.rank())

    def ask(
        self,
        function: Callable[..., None],
        arguments: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """As of `processes.ask`, with `opening` as one of the arguments."""
        if self.opening is not None and processes.count() > 1 and not processes.rank():
            processes.ask(function, opening=self.opening, **arguments())

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this rank reads of a list that all of them have."""
        return items if self.opening is None or self.in_parts else processes.share(items)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """As of `processes.add`, where ranks have read other parts of a text."""
        if self.opening is not None and not self.in_parts:
            processes.add(tensors)

    def whole(self, values: Tensor, width: int | None) -> Tensor:
        """Activations [...,w] of which the ranks may have a part each: `width` is that of all
        parts, None where there are none."""
        if not self.in_parts or width in (None, values.shape[-1]):
            return values
        return processes.whole(values)


def help_with(model: nn.Module, helpers: Helpers) -> None:
    """From here on other ranks work on what this model reads."""
    object.__setattr__(model, _HELPERS, helpers)  # not a submodule


def helpers_of(model: nn.Module) -> Helpers:
    """Those that `help_with` gave the model."""
    helpers: Helpers = getattr(model, _HELPERS, Helpers())
    return helpers
