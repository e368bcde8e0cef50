"""What mixes tokens beside softmax attention, as data: its tensors, and which layers have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families.experts import product, value_of
from spp_export.models.shape import Tensors


@dataclass(frozen=True)
class Mixers:
    """Layers with other mixers than softmax attention, none of which is cut.

    `name` is what plan and report call such mixers: a plural, of which they say that they stay.
    `tensors` are those of a layer that has one, as of `Experts`. The others are values of config.json's list `layer_types`, by
    which layers differ: `kinds` have one, all layers where there are none; `heads` have heads, all
    that have no such mixer where there are none; `channels` have an MLP, all where there are none.
    `of_heads`: a mixer is as wide as the model's heads, so their number cannot be another for the
    whole model.
    """

    name: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    of_heads: bool = False

    @property
    def modules(self) -> frozenset[str]:
        """The modules whose tensors these are, relative to a layer."""
        return frozenset(place.partition("?")[0].rpartition(".")[0] for place in self.tensors)

    def read(
        self, config: Mapping[str, Any], layers: int
    ) -> tuple[tuple[Tensors, ...], frozenset[int], frozenset[int]]:
        """The tensors of every layer's mixer, the layers without heads and those without channels.

        Raises ModelError for a kind of layer, or a size, of which nothing is known.
        """
        tensors = tuple(self._tensors(config))
        kinds = self._kinds(config, layers)
        return (
            tuple(tensors if not self.kinds or kind in self.kinds else () for kind in kinds),
            frozenset(i for i, kind in enumerate(kinds) if not self._has(kind, self.heads)),
            frozenset(
                i for i, kind in enumerate(kinds) if self.channels and kind not in self.channels
            ),
        )

    def _tensors(self, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for place, sizes in self.tensors.items():
            name, _, flag = place.partition("?")
            if not flag or value_of(config, flag):
                yield name, tuple(product(config, word) for word in sizes.split())

    def _has(self, kind: str, heads: tuple[str, ...]) -> bool:
        return kind in heads if heads else not self.kinds or kind not in self.kinds

    def _kinds(self, config: Mapping[str, Any], layers: int) -> list[str]:
        if not self.kinds:
            return [""] * layers
        known = {*self.kinds, *self.heads, *self.channels}
        listed: Any = config.get("layer_types")
        named = isinstance(listed, list) and all(kind in list(known) for kind in listed)
        if not named or len(listed) != layers:
            raise ModelError(
                f"config.json: layer_types must name one of {', '.join(sorted(known))} for each of "
                f"{layers} layers, got {shown(listed)}. Fetch the model again."
            )
        kinds: list[str] = listed
        return kinds
