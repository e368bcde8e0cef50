"""How a tokenizer cuts text before it merges, as the name that llama.cpp has for it.

A name stands for a whole behaviour, which llama.cpp has in its code; so a tokenizer is recognised
by what its tokenizer.json does, and one that does something else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spp_export.common.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# One step: what it does, and its one setting.
_Step = tuple[str, Any]
_BYTES, _BYTES_BY_REGEX = ("bytes", False), ("bytes", True)
# Steps, and whether words that are tokens themselves are not merged anew.
_NAMES: Mapping[tuple[tuple[_Step, ...], bool], str] = {
    ((_BYTES_BY_REGEX,), False): "gpt-2",
    ((("digits", True), _BYTES_BY_REGEX), False): "smollm",
    ((("split", _QWEN2), _BYTES), False): "qwen2",
    ((("split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), _BYTES), False): "smaug-bpe",
    ((("split", _TEKKEN), _BYTES), True): "tekken",
}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for what a byte-level tokenizer.json does; ModelError for any other."""
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    merged = bool(tokenizer["model"].get("ignore_merges"))
    name = _NAMES.get((steps, merged))
    if name is None:
        shown = ", ".join(f"{kind} {setting!r:.60}" for kind, setting in steps) or "nothing"
        raise ModelError(
            f"GGUF: llama.cpp has no known name for this tokenizer's pre-tokenizer ({shown}"
            f"{', ignore_merges' if merged else ''}). Export safetensors or ONNX."
        )
    return name


def space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer.json puts a space before a text.

    Raises ModelError for one that does more to the text than to write spaces as U+2581.
    """
    normalizers = list(_flat(tokenizer.get("normalizer"), "normalizers"))
    pre = list(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    kinds = [step.get("type") for step in normalizers]
    if not pre and kinds in (["Prepend", "Replace"], ["Replace"]):
        prefixes = [step.get("prepend") for step in normalizers[:-1]]
        replaced = normalizers[-1]
        plain = replaced.get("pattern") == {"String": " "} and replaced.get("content") == "\u2581"
        if plain and all(prefix == "\u2581" for prefix in prefixes):
            return bool(prefixes)
    if not normalizers and len(pre) == 1 and pre[0].get("type") == "Metaspace":
        plain = pre[0].get("replacement") == "\u2581" and pre[0].get("split") is False
        if plain:
            return pre[0].get("prepend_scheme") != "never"
    raise ModelError(
        "GGUF: this tokenizer's normalizer and pre-tokenizer are not those of Llama 2 and Mistral "
        f"({', '.join(str(k) for k in kinds) or 'none'}). Export safetensors or ONNX."
    )


def check_normalizer(tokenizer: Mapping[str, Any]) -> None:
    """ModelError for a byte-level tokenizer that changes the text.

    NFC is let pass: it changes only what is not in that form, which nearly all text is.
    """
    kinds = [step.get("type") for step in _flat(tokenizer.get("normalizer"), "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise ModelError(
            f"GGUF: llama.cpp does not normalise text as this tokenizer does ({kinds}). "
            "Export safetensors or ONNX."
        )


def _steps(step: Any) -> Iterator[_Step]:
    for part in _flat(step, "pretokenizers"):
        kind = part.get("type")
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            yield "bytes", bool(part.get("use_regex", True))
        elif kind == "Digits":
            yield "digits", bool(part.get("individual_digits"))
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern")
            yield "split", pattern.get("Regex") if isinstance(pattern, Mapping) else None
        else:
            yield "other", kind


def _flat(step: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a step that may be a sequence of them."""
    if step is None:
        return
    inner = step.get(key) if step.get("type") == "Sequence" else None
    if isinstance(inner, Sequence):
        for part in inner:
            yield from _flat(part, key)
    else:
        yield step
