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
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.stop_tokens import stop_tokens, turn_end
from spp_export.models.tokenizer import load_tokenizer

# The numbers that the format has for kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos", "unk": "unknown", "pad": "padding"}
# In the order of the file.
_KEYS = ("bos", "eos", "unknown", "padding", "eot", "eom")
# Texts of tokens at which llama.cpp stops wherever they are in a vocabulary.
KNOWN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>")
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def tokenizer_metadata(
    directory: Path, vocab_size: int, config: Mapping[str, Any] | None = None
) -> Metadata:
    """The keys `tokenizer.*` for the tokenizer in a directory and a model of `vocab_size` tokens.

    `config` is the model's, and with the other files of the directory says which tokens end an
    answer. Raises ModelError for a tokenizer that llama.cpp does not have.
    """
    loaded = _load(directory)
    config = config or {}
    stop = stop_tokens(companion_object(directory, GENERATION_CONFIG), config, loaded)
    stop = tuple(id_ for id_ in stop if id_ < vocab_size)
    content = json.loads(loaded.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unlike(f"{directory} has a {model.get('type')!s:.40} tokenizer; expected BPE.")
    odd = [
        k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)
    ]
    if odd:
        raise _unlike(f"llama.cpp has no tokenizers with {odd[0]}.")
    _check_added_tokens(content)
    unknown = loaded.unk_token_id
    tokens, kinds = _tokens(content, vocab_size, unknown, directory)
    common: Metadata = {
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": integers(kinds),
    }
    bytes_of_last_resort = bool(model.get("byte_fallback"))
    own = (
        _sentencepiece(content, tokens, directory) if bytes_of_last_resort else _byte_level(content)
    )
    ids = {**_special(loaded, config), **_ends(loaded, stop, directory)}
    numbers = {f"tokenizer.ggml.{key}_token_id": count(ids[key]) for key in _KEYS if key in ids}
    return {**own, **common, **numbers, **_added_around(loaded, ids), **_template(loaded)}


def _unlike(reason: str) -> ModelError:
    """The error for a tokenizer that llama.cpp does not have."""
    return ModelError(f"GGUF: {reason} Export safetensors or ONNX.")


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


def _check_added_tokens(content: Mapping[str, Any]) -> None:
    """ModelError for tokens that are looked for in another way than by their exact text."""
    steps = _flat(content.get("normalizer"), "normalizers")
    prepends = any(step.get("type") == "Prepend" for step in steps)
    for added in content["added_tokens"]:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if added.get(flag)]
        if added.get("normalized") and prepends:
            flags.append("normalized")
        if flags:
            raise _unlike(
                f"the token {added['content']!r:.40} has {flags[0]}, and llama.cpp only looks for "
                "the exact text of a token."
            )


def _byte_level(content: Mapping[str, Any]) -> Metadata:
    from tokenizers.pre_tokenizers import ByteLevel

    model = content["model"]
    check_normalizer(content)
    if model.get("unk_token") and not set(ByteLevel.alphabet()) <= model["vocab"].keys():
        raise _unlike(
            "this tokenizer has no tokens for some bytes but one for unknown text, and llama.cpp "
            "leaves unknown bytes out."
        )
    merges = [" ".join(pair) for pair in _merges(model)]
    if not merges:
        raise _unlike("this tokenizer merges nothing, and llama.cpp wants at least one merge.")
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre_tokenizer_name(content)),
        "tokenizer.ggml.add_space_prefix": flag(False),
        "tokenizer.ggml.merges": texts(merges),
    }


def _sentencepiece(content: Mapping[str, Any], tokens: Sequence[str], directory: Path) -> Metadata:
    """llama.cpp merges what gives the best token, where tokenizer.json lists merges in order; so a
    token's score is minus the place of the merges that give it."""
    try:
        prefix = space_prefix(content)
    except ModelError as error:
        raise ModelError(f"{error}{_as_it_stands(directory)}") from None
    _check_merges(content)
    places: dict[str, int] = {}
    previous = None
    for place, (left, right) in enumerate(_merges(content["model"])):
        token = left + right
        if token in places and token != previous:
            raise _unlike(
                "this tokenizer's merges are not ordered by token, as llama.cpp needs them."
            )
        places.setdefault(token, place)
        previous = token
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.add_space_prefix": flag(prefix),
        "tokenizer.ggml.scores": reals([-float(places.get(token, 0)) for token in tokens]),
    }


def _check_merges(content: Mapping[str, Any]) -> None:
    """ModelError where llama.cpp, which joins any two tokens that make a third and writes what has
    no token as bytes, would do what tokenizer.json does not."""
    model = content["model"]
    vocab = model["vocab"]
    if model.get("ignore_merges"):
        raise _unlike("llama.cpp has ignore_merges in no tokenizer of this kind.")
    missing = next((byte for byte in _BYTE_TOKENS if byte not in vocab), None)
    if missing:
        raise _unlike(
            f"this tokenizer has no token {missing}, and llama.cpp wants one for every byte."
        )
    merges = set(_merges(model))
    added = {token["content"] for token in content["added_tokens"]}
    for token in vocab.keys() - added:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            joined = all(len(part) == 1 or part in vocab for part in pair)
            if joined and pair not in merges:
                raise _unlike(
                    f"this tokenizer does not merge {pair[0]!r:.40} and {pair[1]!r:.40} although "
                    f"it has {token!r:.40}, and llama.cpp would."
                )


def _as_it_stands(directory: Path) -> str:
    """A way out where the class of the tokenizer, and not its tokenizer.json, is the hindrance."""
    try:
        plain = load_tokenizer(directory, without_torch=True)
        space_prefix(json.loads(plain.backend_tokenizer.to_str()))
    except ModelError:
        return ""
    return (
        " Or have its tokenizer.json read as it stands, which llama.cpp can do: in a copy of the "
        "model, set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json."
    )


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, from either of the forms that tokenizer.json has had."""
    pairs = [p.split(" ") if isinstance(p, str) else p for p in model.get("merges", ())]
    return [(left, right) for left, right in pairs]


def _special(loaded: Any, config: Mapping[str, Any]) -> dict[str, int]:
    """The keys' names for special tokens that end nothing, and their ids."""
    ids: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        token_id = getattr(loaded, f"{name}_token_id")
        listed = config.get(f"{name}_token_id") if token_id is None else token_id
        first = listed[0] if isinstance(listed, list) and listed else listed
        if type(first) is int and first >= 0:
            ids[key] = first
    return ids


def _ends(loaded: Any, stop: Sequence[int], directory: Path) -> dict[str, int]:
    """Keys for the tokens that end an answer. llama.cpp has three; it also knows some by name."""
    if not stop:
        # llama.cpp would take one of its own choice for it
        raise ModelError(f"{directory}: neither tokenizer nor config names the token that ends.")
    eos = stop[0] if loaded.eos_token_id is None else loaded.eos_token_id
    turn = turn_end(loaded)
    names = dict(zip(stop, loaded.convert_ids_to_tokens(list(stop)), strict=True))
    others = [id_ for id_ in stop if id_ != eos]
    others.sort(key=lambda id_: (id_ != turn, names[id_] in KNOWN_ENDS))
    if unknown := [names[id_] for id_ in others[2:] if names[id_] not in KNOWN_ENDS]:
        raise _unlike(
            f"{len(stop)} tokens end an answer of this model, and llama.cpp would not stop at "
            f"{unknown[0]!r:.40}, for a file can name three. Name fewer in generation_config.json."
        )
    return dict(zip(("eos", "eot", "eom"), (eos, *others), strict=False))


def _added_around(loaded: Any, ids: Mapping[str, int]) -> Metadata:
    """Which tokens are put around a text. Raises ModelError for others than bos and eos."""
    whole, text_alone = (
        loaded("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    for begins, ends in ((False, False), (True, False), (False, True), (True, True)):
        around = [ids.get("bos")] * begins, [ids["eos"]] * ends
        if around[0] + text_alone + around[1] == whole:
            return {
                "tokenizer.ggml.add_bos_token": flag(begins),
                "tokenizer.ggml.add_eos_token": flag(ends),
            }
    shown = ", ".join(loaded.convert_ids_to_tokens(whole))
    raise _unlike(
        f"this tokenizer writes 'a' as {shown:.80}, and llama.cpp puts only the tokens that begin "
        "and end a text around it."
    )


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
        raise _unlike(
            f"llama.cpp has no known name for this tokenizer's pre-tokenizer ({shown}"
            f"{', ignore_merges' if merged else ''})."
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
        scheme = pre[0].get("prepend_scheme")
        if plain and scheme == "never":
            return False
        if plain:
            where = "only before a whole text" if scheme == "first" else "only where there is none"
            raise _unlike(
                f"this tokenizer (Metaspace, prepend_scheme {scheme!s:.20}) puts a space {where}; "
                "expected none, or one before a text and after every special token, as llama.cpp "
                "does it."
            )
    raise _unlike(
        "this tokenizer's normalizer and pre-tokenizer are not those of Llama 2 and Mistral "
        f"({', '.join(str(k) for k in kinds) or 'none'})."
    )


def check_normalizer(tokenizer: Mapping[str, Any]) -> None:
    """ModelError for a byte-level tokenizer that changes the text.

    NFC is let pass: it changes only what is not in that form, which nearly all text is.
    """
    kinds = [step.get("type") for step in _flat(tokenizer.get("normalizer"), "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise _unlike(f"llama.cpp does not normalise text as this tokenizer does ({kinds}).")


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
