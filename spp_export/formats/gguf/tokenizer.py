"""A tokenizer as GGUF metadata: tokens, their types, merges or scores, and what begins a text.

Read off the tokenizer that transformers makes of a directory: settings of its class included, that
is the one whose ids llama.cpp has to give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.formats.gguf.values import Metadata, count, flag, integers, reals, text, texts
from spp_export.models.tokenizer import load_tokenizer

# The numbers that the format has for kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_metadata(
    directory: Path, vocab_size: int, config: Mapping[str, Any] | None = None
) -> Metadata:
    """The keys `tokenizer.*` for the tokenizer in a directory and a model of `vocab_size` tokens.

    `config` is the model's, asked for special tokens that the tokenizer does not name. Raises
    ModelError for a tokenizer that llama.cpp does not have.
    """
    loaded = _load(directory)
    content = json.loads(loaded.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"GGUF: {directory} has a {model.get('type')!s:.40} tokenizer; expected BPE. "
            "Export safetensors or ONNX."
        )
    unknown = loaded.unk_token_id
    tokens, kinds = _tokens(content, vocab_size, unknown, directory)
    common: Metadata = {
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": integers(kinds),
    }
    bytes_of_last_resort = bool(model.get("byte_fallback"))
    own = _sentencepiece(content, tokens) if bytes_of_last_resort else _byte_level(content)
    return {**own, **common, **_special(loaded, config or {}, directory), **_template(loaded)}


def _load(directory: Path) -> Any:
    loaded = load_tokenizer(directory)
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{directory}: GGUF needs a tokenizer.json. Load the tokenizer with AutoTokenizer and "
            "save it with save_pretrained."
        )
    return loaded


def _tokens(
    content: Mapping[str, Any], vocab_size: int, unknown: int | None, directory: Path
) -> tuple[list[str], list[int]]:
    """Every token by id and its kind; ids that no token has are filled up."""
    names = {index: token for token, index in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, _NORMAL)
    if content["model"].get("byte_fallback"):
        kinds |= {i: _BYTE for i, token in names.items() if _BYTE_TOKEN.fullmatch(token)}
    for added in content["added_tokens"]:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if content["model"].get("byte_fallback") and unknown is not None:
        kinds[unknown] = _UNKNOWN
    if names and max(names) >= vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has token {names[max(names)]!r:.60}, which is "
            f"{max(names)}, and config.json gives the model vocab_size {vocab_size}, so ids up to "
            f"{vocab_size - 1}. GGUF has as many tokens as the model. Use the tokenizer that the "
            "model was trained with, or give the model its tokens: "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    everything = range(vocab_size)
    return (
        [names.get(index, f"[PAD{index}]") for index in everything],
        [kinds.get(index, _UNUSED) for index in everything],
    )


def _byte_level(content: Mapping[str, Any]) -> Metadata:
    model = content["model"]
    odd = [
        k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)
    ]
    if odd:
        raise ModelError(f"GGUF: llama.cpp has no tokenizers with {odd[0]}.")
    check_normalizer(content)
    merges = [" ".join(pair) for pair in _merges(model)]
    if not merges:
        raise ModelError(
            "GGUF: this tokenizer merges nothing, and llama.cpp wants at least one merge. "
            "Export safetensors or ONNX."
        )
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre_tokenizer_name(content)),
        "tokenizer.ggml.add_space_prefix": flag(False),
        "tokenizer.ggml.merges": texts(merges),
    }


def _sentencepiece(content: Mapping[str, Any], tokens: Sequence[str]) -> Metadata:
    """llama.cpp merges what gives the best token, where tokenizer.json lists merges in order; so a
    token's score is minus the place of the merges that give it."""
    prefix = space_prefix(content)
    places: dict[str, int] = {}
    previous = None
    for place, (left, right) in enumerate(_merges(content["model"])):
        token = left + right
        if token in places and token != previous:
            raise ModelError(
                "GGUF: this tokenizer's merges are not ordered by token, as llama.cpp needs them. "
                "Export safetensors or ONNX."
            )
        places.setdefault(token, place)
        previous = token
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.add_space_prefix": flag(prefix),
        "tokenizer.ggml.scores": reals([-float(places.get(token, 0)) for token in tokens]),
    }


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, from either of the forms that tokenizer.json has had."""
    pairs = [p.split(" ") if isinstance(p, str) else p for p in model.get("merges", ())]
    return [(left, right) for left, right in pairs]


def _special(loaded: Any, config: Mapping[str, Any], directory: Path) -> Metadata:
    ids: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        token_id = getattr(loaded, f"{name}_token_id")
        listed = config.get(f"{name}_token_id") if token_id is None else token_id
        first = listed[0] if isinstance(listed, list) and listed else listed
        if type(first) is int and first >= 0:
            ids[key] = first
    if "eos" not in ids:
        # llama.cpp would take one of its own choice for it
        raise ModelError(f"{directory}: neither tokenizer nor config names the token that ends.")
    encoded = loaded("a")["input_ids"]
    begins = "bos" in ids and encoded[:1] == [ids["bos"]]
    ends = encoded[-1:] == [ids["eos"]]
    numbers = {f"tokenizer.ggml.{key}_token_id": count(value) for key, value in ids.items()}
    return {
        **numbers,
        "tokenizer.ggml.add_bos_token": flag(begins),
        "tokenizer.ggml.add_eos_token": flag(ends),
    }


def _template(loaded: Any) -> Metadata:
    template = getattr(loaded, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return {"tokenizer.chat_template": text(template)} if isinstance(template, str) else {}


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
