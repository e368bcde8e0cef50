"""Other ranks that hold the same model and read their share of a text."""

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
    """The ranks that work with this one on what a model reads; `opening` says how they open it, and
    None that there are none."""

    opening: Mapping[str, Any] | None = None

    def ask(
        self, function: Callable[..., None], arguments: Callable[[], Mapping[str, Any]]
    ) -> None:
        """As of `processes.ask`, with `opening` as one of the arguments."""
        if self.opening is not None and not processes.rank():
            processes.ask(function, opening=self.opening, **arguments())

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of a list that all of them have."""
        return items if self.opening is None else processes.share(items)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """As of `processes.add`."""
        if self.opening is not None:
            processes.add(tensors)


def help_with(model: nn.Module, opening: Mapping[str, Any]) -> None:
    """From here on other ranks work on what this model reads."""
    if processes.count() > 1:
        object.__setattr__(model, _HELPERS, Helpers(opening))  # not a submodule


def helpers_of(model: nn.Module) -> Helpers:
    """Those that `help_with` gave the model."""
    helpers: Helpers = getattr(model, _HELPERS, Helpers())
    return helpers
