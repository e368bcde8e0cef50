"""Which of llama.cpp's architectures computes a decoder, as its own loaders have it.

Most of them size every layer like the first. Where layers differ, `deci` is a Llama that does not,
`openelm` a Qwen3 whose output matrix is always the embedding, and `step35` one with an output
matrix of its own, whose MLPs are as wide in every layer: narrower ones are filled up with zeros.
Where a layer keeps no attention or no MLP, the file has one of zeros, which writes nothing; `deci`
can do without most attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from spp_export.common.errors import ModelError
from spp_export.formats.gguf.options import BLOCK
from spp_export.formats.gguf.values import Metadata, count, flag, integers, real
from spp_export.formats.settings import (
    Settings,
    features_refusal,
    rotation,
    settings_of,
)
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Family, Feature
from spp_export.models.families.computed import Computed
from spp_export.models.shape import LayerShape, Layout

_ELSE = "Export safetensors or ONNX."

Keys = Callable[[Checkpoint, Settings], Metadata]


def _none(decoder: Checkpoint, settings: Settings) -> Metadata:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp wants the weights, and what it computes of them.

    name         llama.cpp's own
    features     what it computes beyond a Llama
    activation   of the MLP
    interleaved  it rotates neighbours, not halves
    fused        q, k and v are one matrix
    gate_up      gate and up are one matrix
    frequencies  it reads factors of the rotary frequencies from a tensor
    biases       which projections may have one: "qkv", "output", "mlp"
    norms        its names for norms, where they are not attn_norm and ffn_norm: by the field of the
                 family, where that has both, or by the place among `Family.norms`
    either       of the features, those that may be missing
    slides       it knows windows of layers
    caps         it knows caps of scores and logits
    partial      it rotates the beginning of a head where that is all that turns
    full_width   queries are as wide as the stream
    needs        the projections that must have biases
    odd_layers   numbers of layers at which it takes another factor of scores
    ties         the output matrix is always the embedding
    factors      it knows factors of scores and logits
    keys         metadata that no other has, without its prefix
    padded       MLPs are as wide in every layer
    attends      it has attention in every layer
    """

    name: str
    features: frozenset[Feature] = frozenset()
    activation: str = "silu"
    interleaved: bool = False
    fused: bool = False
    gate_up: bool = False
    frequencies: bool = False
    biases: frozenset[str] = frozenset()
    norms: Mapping[str | int, str] = field(default_factory=dict)
    either: frozenset[Feature] = frozenset()
    slides: bool = False
    caps: bool = False
    partial: bool = False
    full_width: bool = False
    needs: frozenset[str] = frozenset()
    odd_layers: tuple[int, ...] = ()
    ties: bool = False
    factors: bool = False
    keys: Keys = _none
    padded: bool = False
    attends: bool = True


def _caps(decoder: Checkpoint, settings: Settings) -> Metadata:
    caps = {"attn_logit_softcapping": settings.score_cap}
    caps["final_logit_softcapping"] = settings.logit_cap
    return {name: real(value) for name, value in caps.items() if value is not None}


def _windows(decoder: Checkpoint, settings: Settings) -> Metadata:
    """The window, and the period in which the last layer alone has none. Raises ModelError for
    layers in another order."""
    slides = [window is not None for window in settings.windows]
    window = next((window for window in settings.windows if window is not None), None)
    period = slides.index(False) + 1 if False in slides else 0
    if period and slides != [layer % period < period - 1 for layer in range(len(slides))]:
        raise ModelError(
            f"GGUF: llama.cpp takes one layer without a window after every {period - 1} with one, "
            f"and this {decoder.family.model_type} has them in another order. {_ELSE}"
        )
    return {
        "attention.sliding_window": count(window or settings.context_length),
        "attention.sliding_window_pattern": count(period),
    }


def _all_slide(decoder: Checkpoint, settings: Settings) -> Metadata:
    """Every layer in a window that hides nothing: the others would rotate half a head."""
    return {
        "attention.sliding_window": count(settings.context_length),
        "attention.sliding_window_pattern": integers([1] * decoder.shape.num_layers),
        "expert_feed_forward_length": count(0),
        "expert_count": count(0),
    }


def _parallel(decoder: Checkpoint, settings: Settings) -> Metadata:
    return {"use_parallel_residual": flag(Feature.PARALLEL in decoder.family.features)}


def _logit_scale(decoder: Checkpoint, settings: Settings) -> Metadata:
    return {"logit_scale": real(settings.logits)}


_F = Feature
_QKV, _ALL = frozenset({"qkv"}), frozenset({"qkv", "output", "mlp"})
_POST: Mapping[str | int, str] = {0: "post_attention_norm", 1: "post_ffw_norm"}
_LLAMA = frozenset({_F.FUSED, _F.MULTIPLIERS, _F.ROTARY})
_GEMMA = frozenset({_F.SHIFTED_NORM, _F.ACTIVATION, _F.MULTIPLIERS})
_GPT = frozenset({_F.NO_GATE, _F.LAYER_NORM, _F.FUSED, _F.SIDE_BY_SIDE})
_TANH = "gelu_tanh"

_LISTED = (
    Architecture("llama", _LLAMA, interleaved=True, frequencies=True, biases=_ALL, either=_LLAMA),
    Architecture(
        "deci",
        _LLAMA,
        interleaved=True,
        frequencies=True,
        biases=_ALL,
        either=_LLAMA,
        attends=False,
    ),
    Architecture("qwen2", biases=_QKV, full_width=True),
    Architecture("qwen3"),
    Architecture("openelm", fused=True, ties=True),
    Architecture("step35", slides=True, keys=_all_slide, padded=True),
    Architecture("gemma", _GEMMA, _TANH, ties=True),
    Architecture(
        "gemma2",
        _GEMMA | {_F.SANDWICH, _F.SOFTCAP},
        _TANH,
        norms=_POST,
        slides=True,
        caps=True,
        ties=True,
        odd_layers=(46,),
        keys=lambda decoder, settings: _caps(decoder, settings) | _windows(decoder, settings),
    ),
    Architecture(
        "gemma3",
        _GEMMA | {_F.SANDWICH, _F.SOFTCAP, _F.ROTARY},
        _TANH,
        norms=_POST,
        slides=True,
        odd_layers=(62,),
        keys=_windows,
    ),
    Architecture(
        "arcee",
        frozenset({_F.NO_GATE}),
        "relu2",
        interleaved=True,
        frequencies=True,
    ),
    Architecture(
        "starcoder2", frozenset({_F.NO_GATE, _F.LAYER_NORM}), _TANH, biases=_ALL, full_width=True
    ),
    Architecture(
        "gpt2",
        _GPT | {_F.POSITIONS, _F.TRANSPOSED},
        _TANH,
        fused=True,
        biases=_ALL,
    ),
    Architecture(
        "phi2",
        frozenset({_F.NO_GATE, _F.LAYER_NORM, _F.PARALLEL, _F.ROTARY}),
        _TANH,
        biases=_ALL,
        partial=True,
        full_width=True,
    ),
    Architecture(
        "phi3", frozenset({_F.FUSED, _F.ROTARY}), fused=True, gate_up=True, full_width=True
    ),
    Architecture(
        "stablelm",
        frozenset({_F.LAYER_NORM, _F.PARALLEL, _F.ROTARY}),
        biases=_QKV,
        either=frozenset({_F.PARALLEL}),
        partial=True,
        keys=_parallel,
    ),
    Architecture(
        "gptneox",
        _GPT | {_F.PARALLEL, _F.ROTARY},
        "gelu",
        fused=True,
        biases=_ALL,
        needs=_ALL,
        either=frozenset({_F.PARALLEL}),
        partial=True,
        keys=_parallel,
    ),
    Architecture(
        "falcon",
        _GPT | {_F.PARALLEL, _F.ROTARY},
        "gelu",
        fused=True,
        norms={"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"},
    ),
    Architecture("bloom", _GPT | {_F.ALIBI}, _TANH, fused=True, biases=_ALL),
    Architecture(
        "command-r",
        frozenset({_F.LAYER_NORM, _F.PARALLEL, _F.MULTIPLIERS, _F.ROTARY}),
        interleaved=True,
        factors=True,
        keys=_logit_scale,
        full_width=True,
    ),
    Architecture(
        "glm4",
        frozenset({_F.FUSED, _F.ROTARY, _F.SANDWICH}),
        interleaved=True,
        gate_up=True,
        biases=_QKV,
        norms=_POST,
        partial=True,
    ),
    Architecture(
        "nemotron",
        frozenset({_F.NO_GATE, _F.LAYER_NORM, _F.SHIFTED_NORM, _F.ROTARY}),
        "relu2",
        biases=_ALL,
        partial=True,
        full_width=True,
    ),
)
# What is the same once the tensors are read.
_READ = frozenset({_F.FUSED, _F.SIDE_BY_SIDE, _F.TRANSPOSED})
_NORMS_HEADS = ("qwen3", "openelm", "step35", "gemma3")
_ARCHITECTURES = {one.name: one for one in _LISTED}
# What some architecture of the list computes.
_KNOWN = frozenset().union(*(one.features for one in _LISTED))


def family_refusal(family: Family, layout: Layout) -> str | None:
    """Why llama.cpp computes no model of a family in a layout; None where it computes some."""
    if refusal := features_refusal(family, _KNOWN, "GGUF"):
        return refusal
    computed = family.computed or Computed()
    if layout == "uniform" and computed.llama_cpp:
        return None
    chosen = _ARCHITECTURES["llama" if layout == "uniform" else "deci"]
    return family.refusal(set(Feature) - chosen.features, _who(chosen)) or _other(computed, chosen)


def gguf_settings(decoder: Checkpoint) -> Settings:
    """Settings of a checkpoint that is to be a file. Raises ModelError where it cannot be one."""
    return settings_of(decoder, _KNOWN, "GGUF")


def architecture_of(decoder: Checkpoint) -> Architecture:
    """The architecture to write a decoder as: its family's own where that can hold it.

    Raises ModelError for a decoder that llama.cpp cannot compute.
    """
    settings, layers = gguf_settings(decoder), decoder.layers
    own = _ARCHITECTURES.get(settings.computed.llama_cpp)
    if len(set(layers)) > 1:
        chosen = _per_layer(decoder)
    elif own is None or not (_fits(decoder, own) or _is_channels_alone(decoder.family)):
        chosen = _ARCHITECTURES["llama"]
    else:
        chosen = own
    _check(decoder, settings, chosen)
    if not settings.computed.interleaved:
        return chosen
    if not chosen.interleaved:
        raise ModelError(f"{_who(chosen)} rotates halves, not neighbours. {_ELSE}")
    return replace(chosen, interleaved=False)  # they are in pairs already


def file_layers(decoder: Checkpoint, architecture: Architecture) -> tuple[LayerShape, ...]:
    """The layers as the file has them: a head, or a block of channels, of zeros where a layer has
    none and llama.cpp wants some.

    `deci` takes the size of a head from the first layer, drops the bias of attention that it leaves
    out, and of a layer without an MLP forgets what attention wrote.
    """
    layers = []
    for index, layer in enumerate(decoder.layers):
        biased = decoder.bias(decoder.family.output, index) is not None
        if not layer.has_attention and (architecture.attends or index == 0 or biased):
            layer = replace(layer, query_heads=1, kv_heads=1)
        layers.append(layer if layer.has_mlp else replace(layer, channels=BLOCK))
    return tuple(layers)


def _per_layer(decoder: Checkpoint) -> Architecture:
    if not decoder.shape.qk_norm or decoder.family.features:
        return _ARCHITECTURES["deci"]
    return _ARCHITECTURES["openelm" if decoder.shape.tied_embeddings else "step35"]


def _who(chosen: Architecture) -> str:
    return f"GGUF: llama.cpp's architecture {chosen.name}"


def _other(computed: Computed, chosen: Architecture) -> str | None:
    """What an architecture computes otherwise in every model of a family."""
    if computed.rotates:
        return f"{_who(chosen)} rotates every layer"
    if computed.turns_part and not chosen.partial:
        return f"{_who(chosen)} rotates whole heads"
    if computed.clip or computed.query_factor or computed.backwards or computed.normed_heads:
        return f"{_who(chosen)} does nothing to queries but to rotate them"
    return None


def _check(decoder: Checkpoint, settings: Settings, chosen: Architecture) -> None:
    """ModelError for what an architecture computes otherwise."""
    family, shape, who = decoder.family, decoder.shape, _who(chosen)
    family.refuse(set(Feature) - chosen.features, who, _ELSE)
    missing = sorted(chosen.features - chosen.either - _READ - family.features)
    if missing:
        raise ModelError(f"{who} has {missing[0].value}, which this model has not. {_ELSE}")
    if shape.qk_norm and chosen.name not in _NORMS_HEADS:
        raise ModelError(f"{who} has no norms of queries and keys. {_ELSE}")
    if settings.activation != chosen.activation:
        raise ModelError(
            f"{who} has the activation {chosen.activation}, and this model {settings.activation}. "
            f"{_ELSE}"
        )
    if chosen.full_width and not _fits(decoder, chosen):
        raise ModelError(f"{who} wants queries as wide as the stream. {_ELSE}")
    biased = {
        "qkv": shape.qkv_bias,
        "output": shape.output_bias,
        "mlp": shape.mlp_bias or shape.down_bias,
    }
    for name, there in biased.items():
        if there and name not in chosen.biases:
            raise ModelError(
                f"{who} has no biases of {name}, and this checkpoint has some. Use compensation "
                "'lstsq' or 'none' if 'bias' made them; else export safetensors or ONNX."
            )
        if name in chosen.needs and not there:
            raise ModelError(f"{who} has biases of {name}, and this checkpoint none. {_ELSE}")
    if chosen.ties and not shape.tied_embeddings:
        raise ModelError(f"{who} has no output matrix of its own. {_ELSE}")
    if not chosen.slides:
        _check_windows(decoder, settings)
    if other := _other(settings.computed, chosen):
        raise ModelError(f"{other}. {_ELSE}")
    if not chosen.caps and (settings.score_cap is not None or settings.logit_cap is not None):
        raise ModelError(f"{who} has no caps of scores and logits. {_ELSE}")
    if shape.num_layers in chosen.odd_layers:
        raise ModelError(f"{who} scales {shape.num_layers} layers in a way of its own. {_ELSE}")
    kinds = {kind for kind in settings.rotated if kind is not None}
    turned = [rotation(settings, family, shape.head_dim, kind) for kind in kinds]
    if not chosen.partial and any(2 * len(one.frequencies) != shape.head_dim for one in turned):
        raise ModelError(f"{who} rotates whole heads, and this model parts of them. {_ELSE}")


def _check_windows(decoder: Checkpoint, settings: Settings) -> None:
    """A window that is as long as the context never hides anything."""
    context = settings.context_length
    short = [w for w in settings.windows if w is not None and w < context]
    if short:
        raise ModelError(
            f"GGUF: this {decoder.family.model_type} sees the last {short[0]} tokens only (sliding "
            "window), which llama.cpp's Llama does not. Export safetensors or ONNX."
        )


def _fits(decoder: Checkpoint, own: Architecture) -> bool:
    """Whether queries are as wide as the architecture wants them, and it has the biases and factors
    of frequencies that there are."""
    shape = decoder.shape
    if not own.full_width:
        return True
    width = decoder.layers[0].query_heads * shape.head_dim
    extra = (shape.output_bias, "output"), (shape.mlp_bias or shape.down_bias, "mlp")
    kind = rotation(gguf_settings(decoder), decoder.family, shape.head_dim).kind
    return (
        width == shape.hidden_size
        and all(name in own.biases for there, name in extra if there)
        and (own.frequencies or kind != "llama3")
    )


def _is_channels_alone(family: Family) -> bool:
    """Whether all heads have to stay where layers are alike: the family's own architecture wants
    queries as wide as the stream, and `llama` does not compute it."""
    own = _ARCHITECTURES.get(family.computed.llama_cpp if family.computed else "")
    others = set(Feature) - _ARCHITECTURES["llama"].features
    return bool(own and own.full_width and family.features & others)


def uniform_units(family: Family) -> str:
    """What can go where all layers are alike, as of `Family.uniform`."""
    return "channels" if family.uniform == "all" and _is_channels_alone(family) else family.uniform
