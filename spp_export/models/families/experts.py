"""Experts of a family, as data: their tensors, sizes by keys of config.json, and which layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.shape import ExpertTensor

# Far above any model: of one size, and of experts.
_MOST, _MOST_EXPERTS = 1 << 22, 1 << 12
_EACH = "*"


@dataclass(frozen=True)
class Experts:
    """Experts, routers and shared experts of the layers that have any; other layers have the MLP of
    the record.

    `tensors` gives names relative to a layer and shapes: "*" in a name stands for every expert's
    number, "*" among the sizes for all the experts in one tensor. A size is a sum of products of
    numbers and keys of config.json, "2*intermediate_size"; one that is `count` is a row or column
    for each expert; a tensor of size 0 is none. "key|other" is a key with two names, "name?key" a
    tensor that is there only if the key is true.

    `width` is the key of how many channels an expert has; a size that has it in a tensor of experts
    is as wide as they are, or, with "2*", as their gates and ups, which lie one after the other, or
    channel by channel where `side_by_side`. `down` is the module that reads the channels, by its
    last name. Channels are not cut where `width` is "".

    `count` and `routed` are keys: how many experts, and how many see a token; `groups`, where a
    token is first routed to groups of them, each judged by its two best: how many groups there are,
    and how many see a token. The rest are keys that say which
    layers have experts, all where there are none: from `first` on, up to `last` (-1 is the last
    one), every so many (`every`), and not those in the list `never`; where config.json has the list
    `listed`, those in it and no others. `modules` are the names, in memory, of what has experts and
    router, as one or another version of transformers has them.
    """

    tensors: Mapping[str, str]
    count: str
    routed: str
    first: str = ""
    last: str = ""
    every: str = ""
    never: str = ""
    listed: str = ""
    groups: tuple[str, str] | None = None
    modules: tuple[str, ...] = ("mlp",)
    width: str = ""
    down: str = "down_proj"
    side_by_side: bool = False

    def read(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """What a `ModelShape` has of them; ModelError names a size that is missing or
        impossible."""
        count = _size(config, self.count)
        if count > _MOST_EXPERTS:
            raise ModelError(
                f"config.json: {self.count.partition('|')[0]} must be at most {_MOST_EXPERTS}, got "
                f"{count}. The checkpoint is damaged or of another format."
            )
        places = [count > 0 and self._has_experts(config, layer) for layer in range(layers)]
        tensors = tuple(self._mlps(config, count)) if any(places) else ()
        return {
            "mlps": tuple(tensors if sparse else () for sparse in places),
            "experts": count,
            "experts_per_token": min(count, _size(config, self.routed)),
            **self._groups(config, count),
            "expert_channels": _size(config, self.width) if self.width and any(places) else 0,
        }

    def _groups(self, config: Mapping[str, Any], count: int) -> dict[str, int]:
        groups, chosen = (value_of(config, key) or 1 for key in self.groups or ("", ""))
        whole = type(groups) is int and type(chosen) is int and 1 <= chosen <= groups
        if not whole or groups < 1 or count % groups:
            raise ModelError(
                f"config.json: a token is routed to {shown(chosen)} of {shown(groups)} groups of "
                f"{count} experts ({' and '.join(self.groups or ())}), which is not possible. "
                "Fetch the model again."
            )
        return {"expert_groups": groups, "chosen_groups": chosen}

    @property
    def beside(self) -> tuple[str, ...]:
        """The modules of a layer beside its experts whose width follows from that of experts, and
        which stay as they are."""
        names = [
            name.rpartition("?")[0] or name
            for name, sizes in self.tensors.items()
            if self.width and not self._routed(name, sizes) and self.width in _words(sizes)
        ]
        return tuple(dict.fromkeys(name.rsplit(".", 2)[0] for name in names))

    @property
    def down_axis(self) -> int:
        """The axis of channels in the weights of all experts in one [E,...] that read them, as they
        are in memory even where each has a tensor on disk. Only where channels are cut."""
        return next(
            wide + (_EACH in name)
            for name, sizes in self.tensors.items()
            if self.down in name.split(".") and (wide := self._wide(name, sizes)) is not None
        )

    def is_down(self, tensor: ExpertTensor) -> bool:
        """Whether a tensor is the weights that read the channels of experts."""
        return self.down in tensor.name.split(".") and tensor.wide is not None

    def counts(self, count: int) -> dict[str, int]:
        """A number of experts by all its names: each version of transformers reads one."""
        return dict.fromkeys(self.count.split("|"), count)

    def _mlps(self, config: Mapping[str, Any], count: int) -> Iterator[ExpertTensor]:
        for place, sizes in self.tensors.items():
            name, _, flag = place.partition("?")
            if flag and not value_of(config, flag):
                continue
            words = sizes.split()
            shape = tuple(count if word == _EACH else product(config, word) for word in words)
            axes = [axis for axis, word in enumerate(words) if word in (_EACH, self.count)]
            if prod(shape):
                routed, wide = self._routed(name, sizes), self._wide(name, sizes)
                form = ""
                if wide is not None:
                    form = "C" if words[wide] == self.width else "CC"
                    form = f"[{form}]" if form == "CC" and self.side_by_side else form
                axis = axes[0] if axes else None
                yield ExpertTensor(name, shape, axis, routed, wide, form)

    def _routed(self, name: str, sizes: str) -> bool:
        return _EACH in name or _EACH in sizes.split()

    def _wide(self, name: str, sizes: str) -> int | None:
        """The axis of a tensor that counts the channels of an expert."""
        if not self.width or not self._routed(name, sizes):
            return None
        found = [axis for axis, word in enumerate(sizes.split()) if self.width in word.split("*")]
        return found[0] if found else None

    def _has_experts(self, config: Mapping[str, Any], layer: int) -> bool:
        first = _size(config, self.first) if self.first else 0
        last = value_of(config, self.last) if self.last else -1
        every = _size(config, self.every) if self.every else 1
        never = value_of(config, self.never) if self.never else None
        listed = value_of(config, self.listed) if self.listed else None
        lists = all(isinstance(places or [], list) for places in (never, listed))
        if type(last) is not int or every < 1 or not lists:
            raise ModelError(
                f"config.json: {self.last or self.every or self.never} does not say which layers "
                "have experts. Fetch the model again."
            )
        if listed is not None:
            return layer in listed
        before_last = last == -1 or layer <= last
        return (
            first <= layer
            and before_last
            and (layer + 1) % every == 0
            and layer not in (never or ())
        )


def _words(sizes: str) -> list[str]:
    return [key for word in sizes.split() for term in word.split("+") for key in term.split("*")]


def product(config: Mapping[str, Any], word: str) -> int:
    """A sum of products of numbers and keys of config.json, "2*head_dim+v_head_dim"; ModelError
    names a size that is missing or impossible."""
    return sum(
        prod(int(part) if part.isdigit() else _size(config, part) for part in term.split("*"))
        for term in word.split("+")
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = value_of(config, key)
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ModelError(
            f"config.json: {key.partition('|')[0]} must be an integer from 0 to {_MOST}, got "
            f"{shown(value)}. Tensors are of that size; fetch the model again."
        )
    return value


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """What config.json says under one of the names of a key."""
    names = (name for name in key.split("|") if config.get(name) is not None)
    return config.get(next(names, ""))
