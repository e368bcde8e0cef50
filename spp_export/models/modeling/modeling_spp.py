"""Decoders whose layers differ in query heads, KV heads, MLP width and experts.

Models, layers, attention, caches and masks are the stock ones of transformers. A model is made as
the stock class makes it; then every layer gets the modules that differ from a layer made from its
own config. So every attention implementation, and every engine that looks for the stock classes,
works here too. Where the KV heads of a layer serve different numbers of query heads, the stock
attention gets its keys and values with a copy for each query head, made after the cache.

No family is named here: `SppXForCausalLM` is made of transformers' `XForCausalLM` when it is first
asked for, and what is special about a family is in its config.json. `per_layer_modules` there says
where the layers are in the decoder and which of their modules differ from layer to layer, attention
first, and by all names that versions of transformers have for them; `narrow` in it is for an
attention whose config has no size of heads, `wide` for an MLP whose width is given by what is as
wide, `per_head` for an attention that is given something for every head of the dense model, as
scores that are biased by distance are; `stays` lists the layers in which a module is another mixer,
or not there, and stays as it is; `kept` names what stays as it is inside a module that differs, as
an MLP beside experts that are narrower; `empty` is for layers of which a plan kept no attention or
no MLP: by the count that is 0 there, the module, its last projection, whose bias stays, and the
norms that go. `biased_projections` names modules of a layer, such as `mlp.down_proj`, that have a
bias where the stock model has none.
See configuration_spp.py for why this file imports so little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedModel,
)

from .configuration_spp import __getattr__ as config_class

_CLASS = "Spp"
# Where config.json does not say: as in Llama, and in what versions before wrote.
_PER_LAYER_MODULES = {"layers": "layers", "modules": ["self_attn", "mlp"]}
# Where a config of a model that sees has that of its decoder.
_TEXT = "text_config"
# What transformers has chosen for a decoder when it was made.
_EXPERTS = "_experts_implementation_internal"
_IMPLEMENTATIONS = ("_attn_implementation_internal", _EXPERTS)
# An attention that spp_export registers, and that takes keys and values as they are cached.
_UNEVEN_ATTENTION = "spp_ragged"
# What vLLM's Transformers backend sets: an attention that no cache of ours stands before.
_VLLM_ATTENTION = "vllm"
# The auto classes, each with the stock models that it makes. A model that sees may be in two.
AUTO_CLASSES: dict[str, Any] = {
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "AutoModel": MODEL_MAPPING,
}


class _RepeatingCache:
    """A cache, or none, whose keys and values come back with a copy for every query head."""

    def __init__(self, cache: Any, query_groups: Sequence[int]) -> None:
        self._cache = cache
        self._query_groups = query_groups

    def update(self, keys: Tensor, values: Tensor, *place: Any, **options: Any) -> Any:
        """Store keys and values [B,G,S,D]; all that are stored, as [B,H,T,D]."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *place, **options)
        return self._repeated(keys), self._repeated(values)

    def get_seq_length(self, *place: Any) -> int:
        """How many tokens are cached."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(*place))

    def _repeated(self, states: Tensor) -> Tensor:
        # No index tensor: it would have to follow the model from device to device.
        heads = zip(states.split(1, dim=1), self._query_groups, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in heads], dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _repeat(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if attention.config._attn_implementation == _UNEVEN_ATTENTION:
        return None
    cache = _RepeatingCache(kwargs.get("past_key_values"), attention.query_groups)
    return args, {**kwargs, "past_key_values": cache}


def _serve_unevenly(attention: Any, query_groups: Sequence[int]) -> None:
    """Let the KV heads of a stock attention serve these numbers of consecutive query heads."""
    attention.query_groups = tuple(query_groups)
    attention.num_key_value_groups = 1
    attention.register_forward_pre_hook(_repeat, with_kwargs=True)


class _Empty(nn.Module):
    """In place of an attention or an MLP of which nothing is kept: writes what is left of it, the
    bias of its last projection, or zeros."""

    layer_idx: int

    def __init__(self, old: nn.Module, output: str, attends: bool) -> None:
        super().__init__()
        # Layers of transformers 4 ask their attention for its kind.
        plain = {name: it for name, it in vars(old).items() if isinstance(it, (bool, int, str))}
        vars(self).update(plain)
        self._output, self._attends, self.counts = output, attends, False
        last, stock = nn.Module(), cast(Any, old.get_submodule(output))
        last.register_parameter("bias", stock.bias)
        self.add_module(output, last)

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        """What is added to hidden states [B,S,d]; as attention does, with no weights."""
        cache = kwargs.get("past_key_values") if self._attends else None
        if cache is not None and (self.counts or self._is_static(cache)):
            rows = hidden_states.new_zeros(*hidden_states.shape[:2], 1)[:, None]
            position = {"cache_position": kwargs.get("cache_position")}
            cache.update(rows, rows, self.layer_idx, position)
        bias: Any = self.get_submodule(self._output).bias
        written = torch.zeros_like(hidden_states)
        written = written if bias is None else written + bias
        return (written, None) if self._attends else written

    def _is_static(self, cache: Any) -> bool:
        """Whether it is made for a length: transformers 4 then asks it for the size of every layer,
        of which there must be one, if only a number per token."""
        layers = getattr(cache, "layers", ())
        return self.layer_idx < len(layers) and hasattr(layers[self.layer_idx], "max_cache_len")


def _empty(layer: nn.Module, key: str, module: str, output: str, norms: Sequence[str]) -> None:
    attends = key == "num_attention_heads"
    setattr(layer, module, _Empty(getattr(layer, module), output, attends))
    for norm in norms:
        setattr(layer, norm, nn.Identity())


def _share_cache(layers: Any, attention: str, config: Any) -> None:
    """Let caches tell how far they are, which transformers asks the first layer, or the first of
    each kind of attention.

    Where that one has no attention, the next one of its kind that has keeps its states there. Where
    there is none, and the layer is the first, it counts: one number per token.
    """
    attends = [not isinstance(getattr(layer, attention), _Empty) for layer in layers]
    kinds = getattr(config, "layer_types", None) or [""] * len(attends)
    for kind in dict.fromkeys(kinds):
        places = [index for index in range(len(attends)) if kinds[index] == kind]
        first = places[0]
        keeps = next((index for index in places if attends[index]), None)
        if keeps is not None:
            getattr(layers[first], attention).layer_idx = keeps
            getattr(layers[keeps], attention).layer_idx = first
        elif first == 0:
            getattr(layers[first], attention).counts = True


class _PerLayerModel:
    """Put before a stock model class, gives every layer the modules of its own config."""

    config: Any
    _stock: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the weights have the names of the stock class, and are read by its rules."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As of the stock class: transformers finds out by reading the module of a class."""
        return bool(cls._stock._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._stock._can_set_experts_implementation())

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        decoder_config = getattr(config, _TEXT, config)
        if getattr(decoder_config, _EXPERTS, "") is None:
            # Grouped products, the default, take no experts whose width is not a multiple of 16
            # bytes, as that of a layer may be.
            setattr(decoder_config, _EXPERTS, "eager")
        whole = config.part({})
        parent: Any = super()
        parent.__init__(whole, *args, **kwargs)
        model: Any = self
        # Of the decoder, which may be a part of the model.
        own, made_from = decoder_config, getattr(whole, _TEXT, whole)
        # Modules beside the layers keep the config that they were made from: rotary embeddings
        # read head counts again when weights have been loaded.
        parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        for module in parts:
            if module.config is whole:
                module.config = config
            elif type(module.config) is type(made_from):
                for name in _IMPLEMENTATIONS:
                    if hasattr(module.config, name):
                        setattr(own, name, getattr(module.config, name))
                module.config = own
        listed: Any = getattr(own, "per_layer_modules", None) or _PER_LAYER_MODULES
        first = listed["layers"].partition(".")[0]
        decoder = next(x for x in parts if x.config is own and hasattr(x, first))
        layers: Any = decoder.get_submodule(listed["layers"])
        for index, layer in enumerate(layers):
            _graft(layer, own, index, listed)
        if "empty" in listed:
            _share_cache(layers, listed["modules"][0], own)
        model.init_weights()

    def _get_static_cache_init_shape(self) -> Any:
        """What `generate` would make a static cache by at once: not known where one layer's states
        are kept in the place of another."""
        own = getattr(self.config, _TEXT, self.config)
        listed = getattr(own, "per_layer_modules", None) or {}
        parent: Any = super()
        return None if "empty" in listed else parent._get_static_cache_init_shape()


def _graft(layer: nn.Module, config: Any, index: int, listed: Mapping[str, Any]) -> None:
    """Give a layer the modules of one that is made from its own config."""
    own, attention = config.layer_config(index), listed["modules"][0]
    stays = listed.get("stays", {})
    modules = [name for name in listed["modules"] if index not in stays.get(name, ())]
    empty = [key for key in listed.get("empty", ()) if getattr(own, key) == 0]
    for key in empty:
        # Made of size 1, for none of transformers' modules has size 0, and then replaced.
        setattr(own, key, 1)
        own.num_key_value_heads = own.num_key_value_heads or 1
    if "narrow" in listed:
        _narrow(layer, attention, config, index, listed.get("keys", {}), **listed["narrow"])
        # The rest of it, with heads that fill the hidden size.
        own.num_attention_heads = own.num_key_value_heads = 1
        modules = modules[1:]
    if modules:
        donor = type(layer)(own, index)
        for name in modules:
            if hasattr(layer, name):  # not by another version's name
                _keep(listed.get("kept", ()), name, getattr(layer, name), getattr(donor, name))
                setattr(layer, name, getattr(donor, name))
    for side, places in listed.get("wide", {}).items():
        for place in places:
            _resize(layer, place, {side: own.intermediate_size})
    if "per_head" in listed:
        _select_heads(getattr(layer, attention), listed["per_head"], index)
    query_groups = getattr(own, "query_groups", ())
    if len(set(query_groups)) > 1:
        if config._attn_implementation == _VLLM_ATTENTION:
            raise ValueError(
                f"layer {index}: its KV heads serve different numbers of query heads, which vLLM's "
                "attention does not know. Export with --layout ragged --pad."
            )
        _serve_unevenly(getattr(layer, attention), query_groups)
    for name in getattr(config, "biased_projections", ()):
        if any(index in layers and name.startswith(f"{at}.") for at, layers in stays.items()):
            continue
        if name not in dict(layer.named_modules()):  # there are experts in the place of an MLP
            continue
        linear: Any = layer.get_submodule(name)
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for key in empty:
        _empty(layer, key, *listed["empty"][key])


def _keep(places: Sequence[str], name: str, old: nn.Module, new: nn.Module) -> None:
    """Give `new`, a module that takes the place of `old`, those parts of it that stay."""
    for place in places:
        parent, _, part = place.rpartition(".")
        if parent == name and hasattr(old, part):
            setattr(new, part, getattr(old, part))


def _narrow(
    layer: nn.Module,
    name: str,
    config: Any,
    index: int,
    keys: Mapping[str, str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    head_dim: int | None = None,
) -> None:
    """Give a layer an attention that divides its hidden size by its heads, and has fewer heads.

    It is made for the hidden size of so many heads; then its projections get the model's again.
    `keys` are names that the stock config has for counts of a layer.
    """
    own = config.layer_config(index)
    for key, name_in_stock in keys.items():
        setattr(own, name_in_stock, getattr(own, key))
    hidden = own.hidden_size
    own.hidden_size = own.num_attention_heads * (head_dim or own.head_dim)
    setattr(layer, name, getattr(type(layer)(own, index), name))
    for place in inputs:
        _resize(layer, place, {"inputs": hidden})
    for place in outputs:
        _resize(layer, place, {"outputs": hidden})


def _resize(layer: nn.Module, place: str, sizes: Mapping[str, int]) -> None:
    """Give a projection of a layer other numbers of inputs or outputs."""
    old: Any = layer.get_submodule(place)
    weight, kind = old.weight, type(old)
    linear = isinstance(old, nn.Linear)
    outs, ins = weight.shape if linear else reversed(weight.shape)
    ins, outs = sizes.get("inputs", ins), sizes.get("outputs", outs)
    if linear:
        new: Any = kind(ins, outs, old.bias is not None, weight.device, weight.dtype)
    else:  # Conv1D of transformers: always with a bias, and with its inputs first
        with torch.device(weight.device):
            new = kind(outs, ins).to(weight.dtype)
    parent, _, last = place.rpartition(".")
    setattr(layer.get_submodule(parent), last, new)


def _select_heads(attention: Any, listed: Mapping[str, Any], index: int) -> None:
    """Give an attention its own heads' share of arguments that have one for every dense head."""
    heads, whole = list(listed["heads"][index]), listed["of"]
    arguments = set(listed["arguments"])

    def select(_attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = arguments & kwargs.keys()
        own = {name: _of_heads(kwargs[name], heads, whole) for name in given}
        return args, {**kwargs, **own}

    attention.register_forward_pre_hook(select, with_kwargs=True)


def _of_heads(values: Any, heads: Sequence[int], whole: int) -> Any:
    """Those of `heads` of a tensor [B,H,S,T], [B*H,S,T] or [H,S,T]; [B,1,S,T] as it is."""
    if values is None or (values.dim() == 4 and values.shape[1] == 1):
        return values
    if values.dim() == 4:
        return values[:, heads]
    return values.unflatten(0, (-1, whole))[:, heads].flatten(0, 1)


@cache
def _model_class(name: str) -> type[Any]:
    stock: Any = getattr(transformers, name.removeprefix(_CLASS), None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(
            f"no {name}: transformers {transformers.__version__} has no model class "
            f"{name.removeprefix(_CLASS)}. Install a version that has it."
        )
    config: Any = stock.config_class
    own = f"{_CLASS}{config.__name__}"
    if MODEL_MAPPING.get(config, None) is not None:
        # Models that classify have an auto class make their decoder from what they are made from.
        MODEL_MAPPING.register(config_class(f"{own}Part"), MODEL_MAPPING[config], exist_ok=True)
    bases: tuple[type[Any], ...] = (_PerLayerModel, stock)
    if stock.can_generate():
        bases += (GenerationMixin,)  # by itself: transformers makes another class where it is not
    attributes = {
        "__module__": __name__,
        "__qualname__": name,  # by which a pickle finds it
        "_stock": stock,
        "config_class": config_class(own),
        "_auto_class": _auto_class(stock),
    }
    # The stock name: transformers looks up by it how the names of weights are converted.
    return type(stock.__name__, bases, attributes)


def _auto_class(stock: Any) -> str:
    """Which of them makes a stock model."""
    made_by = (
        name
        for name, models in AUTO_CLASSES.items()
        if models.get(stock.config_class, None) is stock
    )
    return next(made_by, "AutoModel")


def __getattr__(name: str) -> Any:
    """`SppXForCausalLM`, `SppXModel` and any other model class of transformers."""
    if not name.startswith(_CLASS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(name)
