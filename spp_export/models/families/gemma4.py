"""What is special about Gemma 4: heads of two sizes, and layers that read others' keys and values.

Only heads of sliding attention that no other layer reads are cut. Heads of full attention are of
another size (global_head_dim), may be of other KV heads and take keys for values
(attention_k_eq_v). The last layers (num_kv_shared_layers) have queries alone, and attend to the
keys and values that the last layer of their kind before them has stored; both would have to keep
the same KV groups. What stays is counted here by the kinds of `Mixers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families.base import STOCK_LAYERS, Feature
from spp_export.models.families.experts import Experts
from spp_export.models.families.mixers import Mixers

_SLIDING, _FULL, _STORED = "sliding_attention", "full_attention", "stored_sliding_attention"
_KV = "num_key_value_heads"
# Elements of a head, and KV heads.
_OF_SLIDING, _OF_FULL = ("head_dim", _KV), ("global_head_dim", "num_global_key_value_heads")
_PER_LAYER = "num_hidden_layers*hidden_size_per_layer_input"
_IF = "?hidden_size_per_layer_input"


def _derive(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The kinds of layers, and the sizes of full attention.

    Raises ModelError where layers are of unknown kinds, or of sizes that their kind does not have.
    """
    count, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    if not isinstance(count, int):
        return {}
    kinds = [(_FULL, _SLIDING)[bool((i + 1) % 6)] for i in range(count)] if kinds is None else kinds
    shared = config.get("num_kv_shared_layers") or 0
    known = isinstance(kinds, list) and all(kind in (_SLIDING, _FULL) for kind in kinds)
    if not known or len(kinds) != count or not (isinstance(shared, int) and 0 <= shared < count):
        raise ModelError(
            f"config.json: layer_types must name {_SLIDING} or {_FULL} for each of {count} layers, "
            f"and num_kv_shared_layers be fewer; got {shown(kinds)} and {shown(shared)}. Fetch the "
            "model again."
        )
    if config.get("enable_moe_block") and config.get("use_double_wide_mlp"):
        raise ModelError(
            "config.json: use_double_wide_mlp is true, as is enable_moe_block; the record of the "
            "gemma4_text family has no field for both."
        )
    kinds = [*kinds[:-1], _FULL]  # as the stock class has it
    same = config.get("attention_k_eq_v") is True
    sizes = _of_full(config, kinds, same)
    first, reads = count - shared, "wide" if config.get("use_double_wide_mlp") else "shared"
    own = [*kinds[:first], *(f"{reads}_{kind}" for kind in kinds[first:])]
    if _SLIDING in kinds[first:] and _SLIDING in own:
        own[first - 1 - own[:first][::-1].index(_SLIDING)] = _STORED
    return {
        "layer_types": own,
        "wide_readers": reads == "wide" and shared > 0,
        "own_values": not same,
        "own_values_bias": not same and bool(config.get("attention_bias")),
        "global_head_dim": sizes["head_dim"],
        "num_global_key_value_heads": sizes.get(_KV, config.get(_KV)),
        STOCK_LAYERS: {str(index): sizes for index, kind in enumerate(kinds) if kind == _FULL},
    }


def _of_full(config: Mapping[str, Any], kinds: Sequence[str], same: bool) -> dict[str, Any]:
    """The size of heads of full attention, and the number of KV heads where it is another; `same`:
    whether keys are values, without which config.json's number of KV heads is not read."""
    listed = config.get(STOCK_LAYERS, config.get("per_layer_config"))
    if not isinstance(listed, Mapping):
        sizes = {"head_dim": config.get("global_head_dim", 512)}
        heads = config.get("num_global_key_value_heads") if same else None
        return sizes if heads in (None, config.get(_KV)) else {**sizes, _KV: heads}
    layers = {
        int(index): {key: size for key, size in sizes.items() if size != config.get(key)}
        for index, sizes in listed.items()
    }
    full = layers.get(kinds.index(_FULL), {})
    if any(layers.get(i, {}) != (full if kind == _FULL else {}) for i, kind in enumerate(kinds)):
        raise ModelError(
            f"config.json: per_layer_config has other sizes than one for all layers of {_FULL}, "
            "of which the record knows nothing. Fetch the model again."
        )
    return {"head_dim": config.get("head_dim"), **full}


def _attention(dim: str, kv_heads: str = "", values: str = "") -> dict[str, str]:
    """Tensors of an attention of which nothing is cut; without `kv_heads` it reads keys and values
    of another layer. `values` is the switch by which it has some that are not its keys."""
    rows = {"q_proj": f"num_attention_heads*{dim}"}
    rows |= {name: f"{kv_heads}*{dim}" for name in ("k_proj", "v_proj") if kv_heads}
    tensors = {}
    for name, size in rows.items():
        switch = values if name == "v_proj" else ""
        tensors[f"self_attn.{name}.weight?{switch}"] = f"{size} hidden_size"
        tensors[f"self_attn.{name}.bias?{switch or 'attention'}_bias"] = size
    norms = ("q_norm", "k_norm") if kv_heads else ("q_norm",)
    return {
        **tensors,
        **{f"self_attn.{norm}.weight": dim for norm in norms},
        "self_attn.o_proj.weight": f"hidden_size {rows['q_proj']}",
        "self_attn.o_proj.bias?attention_bias": "hidden_size",
    }


_WIDE = {
    "mlp.gate_proj.weight": "2*intermediate_size hidden_size",
    "mlp.up_proj.weight": "2*intermediate_size hidden_size",
    "mlp.down_proj.weight": "hidden_size 2*intermediate_size",
}
_READERS = {
    f"shared_{_SLIDING}": _attention("head_dim"),
    f"shared_{_FULL}": _attention(_OF_FULL[0]),
}
_WIDE_READERS = {
    kind.replace("shared", "wide"): {**tensors, **_WIDE} for kind, tensors in _READERS.items()
}
_KEPT = {_FULL: _attention(*_OF_FULL, "own_values"), _STORED: _attention(*_OF_SLIDING)}
_MIXERS = Mixers(
    "heads of full attention and of shared keys and values",
    kinds=(*_KEPT, *_READERS, *_WIDE_READERS),
    heads=(_SLIDING,),
    channels=(_SLIDING, *_KEPT, *_READERS),
    of_heads=True,
    by_kind={**_KEPT, **_READERS, **_WIDE_READERS},
    cached={_STORED: f"2*{'*'.join(_OF_SLIDING)}", _FULL: f"2*{'*'.join(_OF_FULL)}"},
    # Files may have keys and values of layers that read others', and stock classes leave them out.
    unread=dict.fromkeys(
        (*_READERS, *_WIDE_READERS),
        tuple(f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")),
    ),
    everywhere={
        f"per_layer_input_gate.weight{_IF}": "hidden_size_per_layer_input hidden_size",
        f"per_layer_projection.weight{_IF}": "hidden_size hidden_size_per_layer_input",
        f"post_per_layer_input_norm.weight{_IF}": "hidden_size",
    },
)
_AND_WIDE = replace(_MIXERS, name=f"{_MIXERS.name}, and MLPs of double width", of_channels=True)
# Experts beside an MLP, of which these go and that stays.
_EXPERTS = Experts(
    {
        "router.proj.weight": "num_experts hidden_size",
        "router.scale": "hidden_size",
        "router.per_expert_scale": "num_experts",
        "experts.gate_up_proj": "* 2*moe_intermediate_size hidden_size",
        "experts.down_proj": "* hidden_size moe_intermediate_size",
        "mlp.gate_proj.weight": "intermediate_size hidden_size",
        "mlp.up_proj.weight": "intermediate_size hidden_size",
        "mlp.down_proj.weight": "hidden_size intermediate_size",
        "post_feedforward_layernorm_1.weight": "hidden_size",
        "post_feedforward_layernorm_2.weight": "hidden_size",
        "pre_feedforward_layernorm_2.weight": "hidden_size",
    },
    "num_experts",
    "top_k_experts",
    modules=("router", "experts"),
    width="moe_intermediate_size",
)
GEMMA4: Any = {
    "derive": _derive,
    "by_layer": ("head_dim", _KV),
    "mixers": _MIXERS,
    "variants": (
        ("wide_readers", {"mixers": _AND_WIDE}),
        (
            "enable_moe_block",
            {
                "features": frozenset({Feature.EXPERTS}),
                "experts": _EXPERTS,
                **dict.fromkeys(("gate", "up", "down"), ""),
            },
        ),
    ),
    "refused": ("use_bidirectional_attention=all",),
    # The embedding of every token for every layer, and what projects it.
    "tables": {
        f"model.embed_tokens_per_layer.weight{_IF}": f"vocab_size_per_layer_input {_PER_LAYER}"
    },
    "outside": {
        f"model.per_layer_model_projection.weight{_IF}": f"{_PER_LAYER} hidden_size",
        f"model.per_layer_projection_norm.weight{_IF}": "hidden_size_per_layer_input",
    },
}
