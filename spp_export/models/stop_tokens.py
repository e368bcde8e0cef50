"""Which tokens end an answer, as one list for every engine.

Models say it in several places, and engines read different ones: transformers' `generate` reads
generation_config.json, llama.cpp the keys of its file, onnxruntime-genai genai_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.families import decoder_settings, record_of

_EOS = "eos_token_id"
_SPECIAL = ("bos_token_id", _EOS, "pad_token_id")
# Any words that no template writes by itself.
_ANSWER = "The answer of an assistant."


def stop_tokens(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """Ids that end an answer, the most important first, each once.

    generation, config   contents of generation_config.json and config.json, {} where there is none
    tokenizer            of transformers; None where a model has none

    What transformers' `generate` obeys comes first: the generation config, or where it names none
    the config. Then what else the config names, its family's default included, the tokenizer's own
    end token, and the token that the chat template writes after an answer. Of these last ones only
    special tokens count: a stale number would end answers at some word.
    """
    config = _whole(config)
    obeyed = _ids(generation) or _ids(config)
    others = [*_ids(config), *_default(config, obeyed)]
    if tokenizer is None:
        return tuple(dict.fromkeys([*obeyed, *others]))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    own = (id_ for id_ in (tokenizer.eos_token_id, turn_end(tokenizer)) if id_ is not None)
    return tuple(dict.fromkeys([*obeyed, *(id_ for id_ in (*others, *own) if id_ in special)]))


def turn_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer; None where it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is the model's own program and can fail in any way
        return None
    _, answer, rest = text.rpartition(_ANSWER)
    rest = rest.lstrip()
    added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    following = [content for content in added if content and rest.startswith(content)]
    return added[max(following, key=len)] if answer and following else None


def generation_config(
    directory: Path, config: Mapping[str, Any], tokenizer: Any, beside: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The content of a generation_config.json with which `generate` stops at every stop token of
    the model in a directory, which has the config `config`.

    None where the directory's own file already does that, or where it has none and a config.json
    with the content `beside` does. Raises ModelError for a file that is malformed.
    """
    config, beside = _whole(config), _whole(beside)
    stored = companion_object(directory, GENERATION_CONFIG)
    stop = stop_tokens(stored, config, tokenizer)
    obeyed = _ids(stored) if stored else [*_ids(beside), *_default(beside, _ids(beside))]
    if set(stop) == set(obeyed):
        return None
    settings = stored or {name: config[name] for name in _SPECIAL if config.get(name) is not None}
    return {**settings, _EOS: list(stop) if len(stop) > 1 else stop[0]}


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what it says of its decoder, where that is in a part of it."""
    return {**config, **decoder_settings(config)}


def _ids(settings: Mapping[str, Any]) -> list[int]:
    value = settings.get(_EOS)
    return [id_ for id_ in (value if isinstance(value, list) else [value]) if type(id_) is int]


def _default(config: Mapping[str, Any], obeyed: list[int]) -> Iterator[int]:
    """What the family's config class takes where nothing is named."""
    family = record_of(config)
    if not obeyed and _EOS not in config and family and family.end_token is not None:
        token = family.end_token
        yield from token if isinstance(token, tuple) else (token,)
