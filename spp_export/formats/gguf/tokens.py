"""Whether llama.cpp reads texts as the model's own tokenizer does, and stops where it should."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spp_export.evaluation.parity import Check
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.formats.gguf.tokenizer import KNOWN_ENDS

# What tokenizers differ about: spaces, digits, case, scripts, marks, characters of several code
# points, and what looks like their own inner spelling.
_TEXTS = (
    "The quick brown fox",
    " one space before",
    "  two before, two  within, two after  ",
    *(" " * count for count in (1, 2, 3, 5, 8, 13, 21, 34)),
    *("a" + " " * count + "b" for count in (2, 3, 4, 7, 16, 17)),
    "tab\tand\t\ttabs",
    "line\nline\n\nparagraph\r\n\r\n  indented\n",
    "\n",
    "\n\n\n\n",
    "1234567890 12 3.14 1,000 2nd",
    "x=1;y=22;  z=333 != 4_5",
    "don't WE'LL they're I'VE 'S 'tis",
    "naïve café École naïveÉcole straße ŒUVRE ß",
    "北京是中国的首都。人口2189万",
    "日本語のテキスト、カタカナ",
    "한국어 문장입니다",
    "Привет, мир! Ёжик",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "हिन्दी में लिखा है",
    "ภาษาไทยไม่มีช่องว่าง",
    "Ελληνικά ΚΕΊΜΕΝΑ",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "H₂SO₄ → ½ ² ∑ x̄ € ₿",
    "def f(x):\n    return x**2  # comment\n",
    "no\u00a0break, wide\u3000space, zero\u200bwidth, \u2581bar",
    "<0x41> <x> </x> [INST] <|x|> ĠG",
    "<s> </s>",
)
# Tokens that are looked for in a text before anything else.
_ADDED = 24
_DRAWN, _WORDS = 48, 12


def check_tokens(engine: LlamaCpp, tokenizer: Any) -> Check:
    """Ids of texts in llama.cpp are those of `tokenizer`, which is transformers' own."""
    texts = list(_texts(tokenizer))
    name = "token ids in llama.cpp as transformers gives them"
    for text, ids in zip(texts, engine.tokenize(texts, around=True), strict=True):
        expected = list(tokenizer(text)["input_ids"])
        if ids != expected:
            shown = [tokenizer.convert_ids_to_tokens(which) for which in (ids, expected)]
            detail = (
                f"{text!r:.60} is {shown[0]!r:.90}, expected {shown[1]!r:.90}: llama.cpp does not "
                "have this tokenizer, so use safetensors or ONNX"
            )
            return Check(name, False, detail=detail)
    return Check(name, True, detail=f"{len(texts)} texts")


def check_ends(engine: LlamaCpp, tokenizer: Any, stop: Sequence[int]) -> Check:
    """llama.cpp stops at every token that ends an answer."""
    goes_on = [id_ for id_, ends in zip(stop, engine.ends(stop), strict=True) if not ends]
    shown = ", ".join(map(str, tokenizer.convert_ids_to_tokens(goes_on or list(stop))))
    detail = f"goes on after {shown:.80}" if goes_on else f"{shown:.80}"
    return Check("tokens that end an answer in llama.cpp", not goes_on, detail=detail)


def _texts(tokenizer: Any) -> Iterator[str]:
    """Texts for every tokenizer, its own added tokens within texts, and random ones of its tokens.

    In the form NFC where the tokenizer makes that, which llama.cpp does not. And without texts that
    llama.cpp takes for tokens that end an answer, where they are words of this vocabulary: Qwen has
    a "</s>", and no file can say that it ends nothing.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    composed = normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    around = ("{0}the", "{0} the", "a {0}  b{0}\n", "{0}{0}1", " {0}")
    special = [text.format(token) for token in added[:_ADDED] for text in around]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(tokenizer), size=(_DRAWN, _WORDS)).tolist()
    made = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    words = [end for end in KNOWN_ENDS if end not in added]
    for text in (*_TEXTS, *special, *made):
        if any(word in text for word in words):
            continue
        yield unicodedata.normalize("NFC", text) if composed else text
