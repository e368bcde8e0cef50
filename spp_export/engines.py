"""Which engines load what we write, and how well we know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_export.shape import LayerShape

# yes: a test of this project loads and runs it. expected: the engine's source or its users say so,
# and no test of ours does. no: it is known not to.
Loads = Literal["yes", "expected", "no"]


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
            Engine("vLLM", "expected", "stock class; not run here"),
            Engine("llama.cpp", "expected", "by its own converter; not run here"),
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
            "0.29 or newer, Transformers backend, --trust-remote-code; not run here",
        ),
        Engine("llama.cpp", "no", "its converter takes one head count for all layers"),
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

    The form is the options of `spp_export.onnx_graph`. Tests run every form that has kernels for
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
        Engine("onnxruntime", on_cpu, _listed("spp chat, or spp_export.ort", place, batches)),
        Engine("onnxruntime-genai", on_cpu, _listed("0.15 or newer", place)),
        Engine(
            "transformers.js",
            "no" if bf16 else plain,
            "it knows no bf16" if bf16 else _listed("4.3, dtype 'fp32' names the file", singles),
        ),
        Engine("optimum", plain, _listed(optimum, place, singles)),
    )


def _listed(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
