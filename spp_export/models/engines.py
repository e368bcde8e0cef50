"""Which engines load what we write, and on what evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_export.models.shape import LayerShape

# yes: a test of this project loads and runs it. expected: the engine's source or its users say so,
# and no test of ours does. no: it is known not to.
Loads = Literal["yes", "expected", "no"]


# Families that vLLM's Transformers backend cannot run; our plugin has no layers for them.
VLLM_BACKEND_LACKS = frozenset(
    {"bloom", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "phimoe"}
)
# Families of which vLLM's own class computes sizes of a uniform model otherwise than transformers,
# so that only its Transformers backend is right; of the last, neither is.
VLLM_CLASS_LACKS = frozenset({"cohere2", "qwen2", "falcon"})
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


def engines_for(layout: str, layers: Sequence[LayerShape]) -> tuple[Engine, ...]:
    """Engines for a safetensors directory of this layout and these layers.

    Layers of a ragged plan that were padded are of layout per-layer.
    """
    if layout == "uniform":
        return (
            Engine("transformers", "yes", "4.57 or newer, stock class, no code"),
            Engine("vLLM", "expected", listed("stock class; not run here", _cards(layers))),
            Engine("llama.cpp", "no", "write it with --format gguf, or spp convert"),
            Engine("SGLang", "expected", "stock class; not run here"),
        )
    same_kv = len({layer.kv_heads for layer in layers}) == 1
    return (
        Engine(
            "transformers",
            "yes",
            "4.57 or newer: trust_remote_code=True, or after import spp_export",
        ),
        Engine("vLLM", "no", "the KV groups of a layer must be alike: write it with --pad")
        if layout == "ragged"
        else Engine(
            "vLLM",
            "expected",
            listed(
                "0.29 or newer, --trust-remote-code, or with spp-export installed; not run here",
                _cards(layers),
            ),
        ),
        Engine(
            "llama.cpp",
            "no",
            "the KV groups of a layer must be alike: --format gguf --pad"
            if layout == "ragged"
            else "write it with --format gguf, or spp convert",
        ),
        Engine(
            "SGLang",
            "no",
            "one head count for all layers in its Llama"
            if same_kv
            else "one count of KV heads for all layers",
        ),
    )


def _cards(layers: Sequence[LayerShape]) -> str:
    """How many cards vLLM can spread these layers over."""
    ways = [n for n in _CARDS if all(layer.splits(n) for layer in layers)]
    if not ways:
        return "one card: its layers do not divide (see --tp)"
    return f"1, {', '.join(map(str, ways))} cards by --tensor-parallel-size"


def listed(*parts: str) -> str:
    """Remarks on an engine, without the empty ones."""
    return "; ".join(part for part in parts if part)
