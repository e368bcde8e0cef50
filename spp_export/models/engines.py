"""Which engines load what we write, and how well we know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_export.models.shape import LayerShape

# yes: a test of this project loads and runs it. expected: the engine's source or its users say so,
# and no test of ours does. no: it is known not to.
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


def engines_for(layout: str, layers: Sequence[LayerShape]) -> tuple[Engine, ...]:
    """Engines for a safetensors directory of this layout and these layers.

    Layers of a ragged plan that were padded are of layout per-layer.
    """
    if layout == "uniform":
        return (
            Engine("transformers", "yes", "4.57 or newer, stock class, no code"),
            Engine("vLLM", "expected", _listed("stock class; not run here", _cards(layers))),
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
            _listed(
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


def onnx_engines(
    layout: str, attention: str = "gqa", precision: str = "fp32", quant: str | None = None
) -> tuple[Engine, ...]:
    """Engines for an ONNX directory of this layout and with a graph of this form.

    The form is the options of `spp_export.formats.onnx`. Tests run every form that has kernels for
    the CPU in onnxruntime and onnxruntime-genai, and unquantised float32 in the others.
    """
    bf16 = precision == "bf16"
    on_cpu: Loads = "expected" if bf16 else "yes"
    plain: Loads = "yes" if precision == "fp32" and quant is None else "expected"
    place = "on CUDA" if bf16 else ""
    batches = {
        "gqa": "one text at a time, or a batch padded on the right",
        "gqa-bias": "batches padded on either side",
        "standard": "batches padded on either side",
    }[attention]
    # What generates beyond a batch padded on the right would go on after the padding.
    singles = "one text at a time" if attention == "gqa" else "batches padded on the left"
    optimum = (
        "its ORTModelForCausalLM, optimum-onnx with transformers below 4.58"
        if layout == "uniform"
        else "spp_export.ort.ORTSlimForCausalLM, optimum-onnx with transformers below 4.58"
    )
    return (
        Engine(
            "onnxruntime",
            on_cpu,
            _listed("spp chat, or spp_export.ort", place, batches),
        ),
        Engine("onnxruntime-genai", on_cpu, _listed("0.15 or newer", place)),
        Engine(
            "transformers.js",
            "no" if bf16 else plain,
            "it knows no bf16" if bf16 else _listed("4.3, dtype 'fp32' names the file", singles),
        ),
        Engine("optimum", plain, _listed(optimum, place, singles)),
    )


def gguf_engines(architecture: str) -> tuple[Engine, ...]:
    """Engines for a GGUF directory whose file is of this architecture of llama.cpp's."""
    common = architecture in ("llama", "qwen2", "qwen3")
    how = "" if common else f"where its llama.cpp knows the architecture {architecture}; "
    return (
        Engine("llama.cpp", "yes", f"spp chat, or llama-cli -m; architecture {architecture}"),
        Engine("Ollama", "expected", f"{how}not run here"),
        Engine("LM Studio", "expected", f"{how}not run here"),
    )


def _cards(layers: Sequence[LayerShape]) -> str:
    """How many cards vLLM can spread these layers over."""
    ways = [n for n in _CARDS if all(layer.splits(n) for layer in layers)]
    if not ways:
        return "one card: its layers do not divide (see --tp)"
    return f"1, {', '.join(map(str, ways))} cards by --tensor-parallel-size"


def _listed(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
