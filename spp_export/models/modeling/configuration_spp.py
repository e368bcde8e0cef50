"""Configs of decoders whose layers differ in query heads, KV heads and MLP width.

This file and modeling_spp.py are copied into every checkpoint of such a model, where `auto_map` in
its config.json names them. So they import transformers and torch and nothing else, and one text has
to serve transformers 4.57 (configs are plain classes) and 5.x (configs are validated dataclasses).

No family is named here. `SppXConfig` is made of transformers' `XConfig` when it is first asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

# Before the name of a stock class, and before its model type in config.json.
_CLASS, _TYPE = "Spp", "spp_"
_PART = "Part"
# Where a config of a model that sees has that of its decoder.
_TEXT = "text_config"
# Which of the ways to compute attention and experts is taken.
_IMPLEMENTATIONS = {"_attn_implementation_internal", "_experts_implementation_internal"}
# What a stock class of its own has for single layers, in the words of `per_layer_config`.
_STOCK_LAYERS = "stock_per_layer_config"
# What a config keeps of `per_layer_config`: itself, or since transformers 5.14 what it became.
_PER_LAYER = ("per_layer_config", "_heterogeneity_spec")


class _PerLayerConfig:
    """What the per-layer configs add to the stock ones.

    `per_layer_config` maps a layer index (int, or digits as JSON has them) to the keys in which
    that layer departs from the rest of the config. `query_groups` among them, in ragged models,
    says how many consecutive query heads each KV head serves. Where the stock class has sizes of
    its own for single layers, `stock_per_layer_config` has these. modeling_spp.py says what
    `per_layer_modules` and `biased_projections` are.

    `model_type` is the stock one, by which transformers knows how to read weights; config.json has
    one of our own, so that nobody takes the model for a stock one.

    Where the decoder is a part of a model that also sees, all this is said in its own config, in
    `text_config`, which then is one of these as well.
    """

    _auto_class = "AutoConfig"
    model_type: str
    layer_types: Any
    text_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Of transformers 4; 5 makes one of its own, and calls `__post_init__`."""
        listed, text = _taken_out(kwargs), _text_of(kwargs)
        super().__init__(*args, **kwargs)
        self._set_per_layer(listed, text)

    def __post_init__(self, **kwargs: Any) -> None:
        listed, text = _taken_out(kwargs), _text_of(vars(self))
        parent: Any = super()
        parent.__post_init__(**kwargs)
        # Stock configs read their own counts above, which a config with this set refuses.
        self._set_per_layer(listed, text)

    def _set_per_layer(self, listed: Any, text: Mapping[str, Any] | None) -> None:
        if text is None:
            self.per_layer_config = listed
            return
        stock = self.text_config
        own = _config_class(f"{_CLASS}{type(stock).__name__}")(**text)
        # What a caller asks for has been given to the stock one.
        vars(own).update(
            {name: vars(stock)[name] for name in _IMPLEMENTATIONS & vars(stock).keys()}
        )
        self.text_config = own

    def validate_architecture(self) -> None:
        """Accept head counts that do not divide hidden_size: head_dim is explicit here."""

    def validate_layer_type(self) -> None:
        """As the stock class does, and keep the names it knows: transformers 5.17 renames those of
        code that it does not know, and its LFM2 then misses `conv`."""
        named = getattr(self, "layer_types", None)
        # Of the class: some stock ones are static.
        stock: Any = super(_PerLayerConfig, type(self))
        stock.validate_layer_type(self)
        if named is not None and self.layer_types != named:
            self.layer_types = named

    def layer_config(self, index: int) -> Any:
        """A stock config of one layer. Its attention implementation is always this config's."""
        listed: Any = self.per_layer_config or {}
        if isinstance(listed, Mapping):
            return self.part({int(key): changes for key, changes in listed.items()}.get(index, {}))
        changed: Any = getattr(self, "per_layer_attributes", None) or ()  # transformers >= 5.14
        return self.part({name: getattr(listed[index], name) for name in changed})

    def part(self, changes: Mapping[str, Any]) -> Any:
        """A stock config without a per-layer part, with these changes, as in `layer_config`."""
        part = _empty(_part_class(type(self).__name__))
        vars(part).update(self._state(), model_config=self)
        for name, value in changes.items():
            setattr(part, name, value)
        return _with_stock_layers(part)

    def _state(self) -> dict[str, Any]:
        """A copy of what this config says, without its per-layer part and without that of the
        decoder's config in it. Configs of other parts of the model are the same objects."""
        state = {key: value for key, value in vars(self).items() if key not in _PER_LAYER}
        parts = {key: x for key, x in state.items() if isinstance(x, PretrainedConfig)}
        text = parts.get(_TEXT)
        if isinstance(text, _PerLayerConfig):
            # Of the very class that transformers finds a decoder by.
            stock = _empty(_stock(type(text).__name__))
            vars(stock).update(text._state())
            parts[_TEXT] = _with_stock_layers(stock)
        rest = {key: value for key, value in state.items() if key not in parts}
        return {**copy.deepcopy(rest), **parts}

    @property
    def auto_map(self) -> dict[str, str]:
        """Where the auto classes find ours. A copy: transformers would write stock names into it
        when a model is saved. Raises AttributeError where nothing is set, as of any attribute."""
        if "auto_map" not in vars(self):
            raise AttributeError("auto_map")
        return dict(vars(self)["auto_map"])

    @auto_map.setter
    def auto_map(self, value: Mapping[str, str]) -> None:
        places = {auto: name.rpartition(".") for auto, name in value.items()}
        vars(self)["auto_map"] = {
            auto: f"{file}.{_own(name)}" for auto, (file, _, name) in places.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        parent: Any = super()
        output: dict[str, Any] = parent.to_dict()
        output["model_type"] = f"{_TYPE}{self.model_type}"
        output["architectures"] = [_own(name) for name in output.get("architectures") or ()]
        own = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}
        output["auto_map"] = own | vars(self).get("auto_map", {})
        text = output.get(_TEXT)
        if isinstance(text, dict):  # it is no model by itself
            text["model_type"] = text["model_type"].removeprefix(_TYPE)
            for name in ("architectures", "auto_map"):
                text.pop(name, None)
        return output

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """With the stock model type, which transformers compares with the class's."""
        parent: Any = super()
        config, unused = parent.get_config_dict(*args, **kwargs)
        if config.get("model_type") == f"{_TYPE}{cls.model_type}":
            config["model_type"] = cls.model_type
        return config, unused


class _PartConfig:
    """A stock config that a part of a model reads, `model_config` being the whole model's.

    Which attention runs can be switched at any time, so it is never kept here.
    """

    model_config: Any

    @property
    def _attn_implementation_internal(self) -> Any:
        return self.model_config._attn_implementation_internal

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        self.model_config._attn_implementation_internal = value

    @property
    def _experts_implementation_internal(self) -> Any:
        return self.model_config._experts_implementation_internal

    @_experts_implementation_internal.setter
    def _experts_implementation_internal(self, value: Any) -> None:
        self.model_config._experts_implementation_internal = value

    def to_dict(self) -> dict[str, Any]:
        parent: Any = super()
        output: dict[str, Any] = parent.to_dict()
        output.pop("model_config", None)
        return output


def _taken_out(kwargs: dict[str, Any]) -> Any:
    """The per-layer part, out of what a stock config is made of."""
    kwargs.pop("model_type", None)  # it would hide that of the class
    listed = kwargs.pop("per_layer_config", None)
    if kwargs.get(_STOCK_LAYERS):
        kwargs["per_layer_config"] = kwargs[_STOCK_LAYERS]
    return listed


def _with_stock_layers(part: Any) -> Any:
    """A stock config, with what its class has for single layers."""
    if stock := vars(part).get(_STOCK_LAYERS):
        part.per_layer_config = stock
    return part


def _text_of(given: dict[str, Any]) -> dict[str, Any] | None:
    """What a config is given as that of its decoder, if its layers differ; `given` gets it without
    what stock classes do not know."""
    text = given.get(_TEXT)
    if isinstance(text, PretrainedConfig):
        return None
    if not isinstance(text, Mapping) or _PER_LAYER[0] not in text:
        return None
    given[_TEXT] = {key: value for key, value in text.items() if key != _PER_LAYER[0]}
    return {key: value for key, value in text.items() if key != "model_type"}


def _own(name: str) -> str:
    return name if name.startswith(_CLASS) else f"{_CLASS}{name}"


def _stock(name: str) -> type[PretrainedConfig]:
    found = getattr(transformers, name.removeprefix(_CLASS), None)
    if not (isinstance(found, type) and issubclass(found, PretrainedConfig)):
        raise AttributeError(
            f"no {name}: transformers {transformers.__version__} has no config class "
            f"{name.removeprefix(_CLASS)}. Install a version that has it."
        )
    return found


@cache
def _config_class(name: str) -> type[Any]:
    made: Any = type(name, (_PerLayerConfig, _stock(name)), {"__module__": __name__})
    if hasattr(made, "__dataclass_fields__"):
        # Collects the validators anew: those of the parent are bound to the parent's own.
        checked = strict(made)
        checked.validate = _of_the_whole(checked.validate)
        if hasattr(checked, "validate_rope"):  # vLLM calls it by itself
            checked.validate_rope = _of_the_whole(checked.validate_rope)
    found: type[Any] = made
    return found


def _of_the_whole(validate: Callable[..., None]) -> Callable[..., None]:
    """A validation that sees the counts of the whole model, which stock configs compare."""

    def validate_whole(config: Any, *args: Any, **kwargs: Any) -> None:
        hidden = {key: vars(config).pop(key) for key in _PER_LAYER if key in vars(config)}
        try:
            validate(config, *args, **kwargs)
        finally:
            vars(config).update(hidden)

    return validate_whole


@cache
def _part_class(name: str) -> type[Any]:
    return type(f"{name}{_PART}", (_PartConfig, _stock(name)), {"__module__": __name__})


def _empty(kind: Any) -> Any:
    """An instance that no constructor has seen."""
    return kind.__new__(kind)


def __getattr__(name: str) -> Any:
    """`SppXConfig`, and `SppXConfigPart`, which models that were pickled name."""
    if not name.startswith(_CLASS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith(_PART):
        return _part_class(name.removesuffix(_PART))
    return _config_class(name)
