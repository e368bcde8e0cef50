"""Which engines load an ONNX directory."""

from __future__ import annotations

from spp_export.models.engines import Engine, Loads, listed
from spp_export.models.families import FAMILIES, Feature
from spp_export.models.families.served import (
    EXPERTS_IN_JS,
    GENAI,
    GENAI_DECODERS,
    TRANSFORMERS_JS,
)


def onnx_engines(
    model_type: str,
    layout: str,
    attention: str = "gqa",
    precision: str = "fp32",
    quant: str | None = None,
) -> tuple[Engine, ...]:
    """Engines for an ONNX directory of a family, of this layout and with a graph of this form.

    The form is the options of `spp_export.formats.onnx`. Tests run every family and every form that
    has kernels for the CPU in onnxruntime; in onnxruntime-genai those families that it knows by
    name, and their unquantised float32 in the others.
    """
    bf16, tried = precision == "bf16", model_type in GENAI
    on_cpu: Loads = "expected" if bf16 else "yes"
    family = FAMILIES.get(model_type)
    sinks = family is not None and Feature.SINKS in family.features and attention == "gqa"
    in_genai: Loads = on_cpu if tried or model_type in GENAI_DECODERS else "expected"
    whole = precision == "fp32" and quant is None
    plain: Loads = "yes" if tried and whole else "expected"
    in_js: Loads = "yes" if model_type in EXPERTS_IN_JS and whole else plain
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
            # 1.23 computes sinks beside a window wrongly, without a word.
            listed("spp chat, or spp_export.ort", "1.24 or newer" if sinks else "", place, batches),
        ),
        Engine("onnxruntime-genai", in_genai, listed("0.15 or newer", place)),
        _transformers_js(model_type, in_js, singles, bf16=bf16),
        Engine("optimum", plain, listed(optimum, place, singles)),
    )


def _transformers_js(model_type: str, plain: Loads, batches: str, *, bf16: bool) -> Engine:
    """Transformers.js, which has a class for each family; `plain`: whether it loads those."""
    name = "transformers.js"
    if bf16:
        return Engine(name, "no", "it knows no bf16")
    if model_type not in TRANSFORMERS_JS:
        return Engine(name, "no", "4.3 has no class of this family")
    return Engine(name, plain, listed("4.3, dtype 'fp32' names the file", batches))
