"""Which engines load what we write, and on what evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_export.models.families import FAMILIES
from spp_export.models.families.served import BACKEND, NOT_BACKEND, PLUGIN, SGLANG, VLLM
from spp_export.models.shape import LayerShape

# yes: a test of this project loads and runs it. expected: the engine's source or its users say so,
# and no test of ours does. no: it is known not to, or nobody says that it does.
Loads = Literal["yes", "expected", "no"]


# Sizes of one machine's set of cards.
_CARDS = (2, 4, 8)


@dataclass(frozen=True)
class Engine:
    """One engine, whether it loads the output, and what the user must know."""

    name: str
    loads: Loads
    how: str

    def to_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def engines_for(model_type: str, layout: str, layers: Sequence[LayerShape]) -> tuple[Engine, ...]:
    """Engines for a safetensors directory of a family, of this layout and these layers.

    Layers of a ragged plan that were padded are of layout per-layer.
    """
    uniform, ragged = layout == "uniform", layout == "ragged"
    code = "4.57 or newer: trust_remote_code=True, or after import spp_export"
    other = "write it with --format gguf, or spp convert"
    if ragged:
        other = "the KV groups of a layer must be alike: --format gguf --pad"
    return (
        Engine("transformers", "yes", "4.57 or newer, stock class, no code" if uniform else code),
        vllm(model_type, layout, layers),
        Engine("llama.cpp", "no", other),
        _sglang(model_type, layout, layers),
    )


def vllm(model_type: str, layout: str, layers: Sequence[LayerShape] = ()) -> Engine:
    """vLLM, for such a directory."""

    def runs(how: str) -> Engine:
        return Engine("vLLM", "yes", listed(f"0.29 or newer, {how}", _cards(layers)))

    if layout == "ragged":
        return Engine("vLLM", "no", "the KV groups of a layer must be alike: write it with --pad")
    if layout == "uniform" and model_type in VLLM:
        return runs("no code")
    if layout == "uniform" and model_type in BACKEND:
        return runs("--model-impl transformers")
    if any(layer.dropped_experts for layer in layers):
        return Engine("vLLM", "no", "one number of experts for all layers")
    if any(layer.dropped_channels for layer in layers):
        return Engine("vLLM", "no", "one width of experts for all layers: --layout uniform")
    record = FAMILIES.get(model_type)
    # Layers with experts have no other MLP, and none of either goes as a whole.
    stay = record is not None and record.experts is not None
    if model_type in PLUGIN | BACKEND and not all(
        layer.has_attention and (layer.has_mlp or stay) for layer in layers
    ):
        how = "every layer must have attention and an MLP there: plan --no-allow-empty-layers"
        return Engine("vLLM", "no", how)
    if layout != "uniform" and model_type in PLUGIN:
        return runs("with spp-export installed, or --trust-remote-code")
    if layout != "uniform" and model_type in BACKEND:
        return runs("--trust-remote-code")
    if model_type in NOT_BACKEND:
        return Engine("vLLM", "no", "its Transformers backend does not run this family")
    return Engine("vLLM", "no", "nothing is known of this family there")


def _sglang(model_type: str, layout: str, layers: Sequence[LayerShape]) -> Engine:
    if layout != "uniform":
        same_kv = len({layer.kv_heads for layer in layers}) == 1
        of = "one head count for all layers" if same_kv else "one count of KV heads for all layers"
        return Engine("SGLang", "no", of)
    if model_type in SGLANG:
        return Engine("SGLang", "expected", "stock class; not run here")
    return Engine("SGLang", "no", "nothing is known of this family there")


def _cards(layers: Sequence[LayerShape]) -> str:
    """How many cards vLLM can spread these layers over, if any are given."""
    if not layers:
        return ""
    ways = [n for n in _CARDS if all(layer.splits(n) for layer in layers)]
    if not ways:
        return "one card: its layers do not divide (see --tp)"
    return f"1, {', '.join(map(str, ways))} cards by --tensor-parallel-size"


def listed(*parts: str) -> str:
    """Remarks on an engine, without the empty ones."""
    return "; ".join(part for part in parts if part)
