"""Checkpoints that store their weights in few bits: which method made them, and what undoes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.installation import install_command
from spp_export.common.json_files import shown

KEY = "quantization_config"
# What transformers does on reading (`dequantize=True`), what it does of a model that it has read
# (`model.dequantize()`), and our own `packed_weights`.
READING, LOADED, PACKED = "reading", "loaded", "packed"
_INSTEAD = "give the full-precision model that it was made from: hf download ORG/NAME"


@dataclass(frozen=True)
class Method:
    """A way of quantising.

    title     as people call it
    way       what dequantises it: READING, LOADED or PACKED; None for nothing, or what needs a GPU
    packages  import names of what that needs, beside what comes with spp
    bits      of a weight, where the method alone says so
    """

    title: str
    way: str | None = None
    packages: tuple[str, ...] = ()
    bits: int | None = None


# Every name that quantization_config may have in `AUTO_QUANTIZER_MAPPING` of transformers.
METHODS: Mapping[str, Method] = {
    "fp8": Method("FP8", READING, bits=8),
    "mxfp8": Method("MXFP8", READING, bits=8),
    "mxfp4": Method("MXFP4", READING, bits=4),
    "compressed-tensors": Method("compressed-tensors", READING, ("compressed_tensors",)),
    "bitsandbytes_4bit": Method("bitsandbytes, 4 bits", LOADED, ("bitsandbytes",), 4),
    "bitsandbytes_8bit": Method("bitsandbytes, 8 bits", LOADED, ("bitsandbytes",), 8),
    "gptq": Method("GPTQ", PACKED),
    "awq": Method("AWQ", PACKED),
    **{
        name: Method(title)
        for name, title in {
            "aqlm": "AQLM",
            "auto-round": "AutoRound",
            "bitnet": "BitNet",
            "eetq": "EETQ",
            "fbgemm_fp8": "FBGEMM FP8",
            "fouroversix": "Four Over Six",
            "fp_quant": "FP-Quant",
            "gemma": "Gemma's own quantisation",
            "gguf": "GGUF",
            "higgs": "HIGGS",
            "hqq": "HQQ",
            "metal": "Metal",
            "nvfp4": "NVFP4",
            "quanto": "Quanto",
            "quark": "Quark",
            "sinq": "SINQ",
            "spqr": "SpQR",
            "torchao": "torchao",
            "vptq": "VPTQ",
        }.items()
    },
}


def settings_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a parsed config.json, or of the text model in it; None without."""
    text = config.get("text_config")
    inner = text.get(KEY) if isinstance(text, Mapping) else None
    return inner if config.get(KEY) is None else config[KEY]


def quant_method(config: Mapping[str, Any]) -> str | None:
    """How the weights are quantised, by a name in METHODS where it is one; None where they are not.

    "" where quantization_config does not say.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        return ""
    # As transformers does, whatever quant_method says.
    for flag, name in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if settings.get(flag) is True:
            return f"bitsandbytes_{name}"
    method = settings.get("quant_method")
    return method if isinstance(method, str) else ""


def bits_of(config: Mapping[str, Any]) -> int:
    """Bits of a quantised weight; 8, the most, where the config does not say."""
    method = METHODS.get(quant_method(config) or "")
    if method and method.bits:
        return method.bits
    settings = settings_of(config)
    found = [settings.get("bits", settings.get("w_bit"))]
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    known = [bits for bits in found if type(bits) is int and 1 <= bits <= 8]
    return min(known, default=8)


def full_precision(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with its weights dequantised."""
    plain = {key: value for key, value in config.items() if key != KEY}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return plain


def check_not_quantised(config: Mapping[str, Any]) -> None:
    """ModelError, with what to do, for a config with quantization_config."""
    method = quant_method(config)
    if method is None:
        return
    require_way(method)
    raise ModelError(
        f"{_found(method)}. Add --dequantize to slice what they stand for, or {_INSTEAD}."
    )


def require_way(method: str) -> Method:
    """The method of this name. ModelError for one that nothing here undoes, with what would."""
    known = METHODS.get(method)
    if known is None:
        raise ModelError(
            f"{_found(method)}, which transformers does not know. Instead, {_INSTEAD}."
        )
    if known.way is None:
        raise ModelError(
            f"{_found(method)}, which is not dequantised without a GPU, if at all. Instead, "
            f"{_INSTEAD}."
        )
    for package in known.packages:
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise ModelError(
                f"{_found(method)}, which needs the package {name}. Run: "
                f"{install_command(name, extra=False)} and add --dequantize, or {_INSTEAD}."
            )
    return known


def _found(method: str) -> str:
    known = METHODS.get(method)
    title = f"by {known.title} " if known else ""
    named = f"{KEY}.quant_method {shown(method)}" if method else KEY
    return f"config.json: the weights are quantised {title}({named})"
