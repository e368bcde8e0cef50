"""Tokenizers in llama.cpp: the ids that transformers gives, and the metadata that makes it so."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from gguf_cases import make
from old_transformers import since_5
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from spp_export.common.errors import ModelError
from spp_export.formats.gguf import GgufOptions
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.formats.gguf.tokenizer import pre_tokenizer_name
from spp_export.formats.gguf.tokens import check_ends, check_tokens
from spp_export.formats.gguf.values import flag, text
from spp_export.formats.gguf.write import write_gguf
from spp_export.models.checkpoint.checkpoint import open_checkpoint
from spp_export.models.tokenizer import load_tokenizer

TEXTS = [
    "The other mother's 1234 brothers, and 56 more.",
    "  two  spaces\n\n\tand tabs\r\n",
    "naïve café — 北京 🙂 ١٢٣",
    "don't WE'LL they're",
    "x=1;y=22;  z=333",
    "</s> other <s>there",
    "</s>other</s>  the <|endoftext|>\n1",
    "",
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    by_words = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([by_words, plain])


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# llama.cpp's name, what cuts, and whether whole words are left alone.
PRE_TOKENIZERS = {
    "gpt-2": (_BYTES, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _BYTES]), False),
    "qwen2": (split(QWEN2), False),
    "llama-bpe": (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), True),
    "smaug-bpe": (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), False),
    "tekken": (split(TEKKEN), True),
}
# Reads tokens of texts off llama.cpp's own server.
_TOKENIZE = """
import json, sys, urllib.request
from spp_export.formats.gguf.llama_child import open_server

server = open_server(sys.argv[1], 64, 1)
for text in json.load(sys.stdin):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
    )
    print(json.dumps(json.load(urllib.request.urlopen(request))["tokens"]))
"""


def train(name: str) -> Tokenizer:
    """A tokenizer that cuts text in a known way, trained on the texts until merges abound."""
    cut, whole = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=["<pad>", "<s>", "</s>", "<|endoftext|>"],
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = whole
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece(prefix: str) -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, characters, and bytes for what has no token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "o"), ("t", "h"), ("e", "r"), ("th", "er"), ("▁o", "ther"), ("▁", "▁")]
    letters = "▁abcdehimnorstuy'."
    for token in [*letters, *(left + right for left, right in merges)]:
        vocab[token] = len(vocab)
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    if prefix == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_tokenizer(tmp_path: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    """A model of as many tokens and seven more, with the tokenizer."""
    vocab = tokenizer.get_vocab_size() + 7
    dense = make("llama-mha-tied", tmp_path, vocab=vocab)
    tokenizer.save(str(dense / "tokenizer.json"))
    path = dense / "tokenizer_config.json"
    content = json.loads(path.read_text()) | settings
    if "<pad>" not in tokenizer.get_vocab():
        content |= {"pad_token": None, "unk_token": "<unk>"}
    path.write_text(json.dumps(content))
    return dense


def written(dense: Path) -> Path:
    decoder = open_checkpoint(dense)
    write_gguf(decoder, gguf_contents(decoder, GgufOptions(), "tiny"), dense)
    return dense / "model.gguf"


def tokens_in_llama_cpp(path: Path, texts: list[str]) -> list[list[int]]:
    result = subprocess.run(
        [sys.executable, "-c", _TOKENIZE, str(path)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    dense = with_tokenizer(tmp_path, train(name))
    path = written(dense)
    fields = {key: f.contents() for key, f in gguf.GGUFReader(path).fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    wanted = AutoTokenizer.from_pretrained(dense)(TEXTS)["input_ids"]
    assert tokens_in_llama_cpp(path, TEXTS) == wanted


@pytest.mark.parametrize("prefix", ["normalizer", "never"])
def test_sentencepiece_tokens(prefix: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    dense = with_tokenizer(tmp_path, sentencepiece(prefix))
    path = written(dense)
    fields = {key: f.contents() for key, f in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] == (prefix != "never")
    texts = ["other mothers", "the brother is  here.", "naïve 12 🙂", "there", "  there", " is "]
    texts += ["</s>other", "the</s> other<s>  is</s>", "\nother\n"]
    expected = AutoTokenizer.from_pretrained(dense)(texts)["input_ids"]
    assert tokens_in_llama_cpp(path, texts) == expected


@pytest.mark.parametrize(
    ("scheme", "where"), [("first", "before a whole text"), ("always", "where there is none")]
)
def test_a_space_that_llama_cpp_does_not_put_is_refused(scheme, where, tmp_path) -> None:
    dense = with_tokenizer(tmp_path, sentencepiece(scheme))
    refused(dense, f"prepend_scheme {scheme}.* puts a space only {where}; expected none.* ONNX.$")


@since_5("its LlamaTokenizer reads tokenizer.json as it stands")
def test_a_class_that_reads_tokenizer_json_otherwise_has_a_way_out(tmp_path: Path) -> None:
    """transformers 5 gives Llama's class a Metaspace, whatever its tokenizer.json says; which is
    what llama.cpp does."""
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    dense = with_tokenizer(tmp_path, sentencepiece("normalizer"), **settings)
    refused(dense, "Or have its tokenizer.json read as it stands.* PreTrainedTokenizerFast in")
    path = dense / "tokenizer_config.json"
    plain = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(plain))
    fields = {k: f.contents() for k, f in gguf.GGUFReader(written(dense)).fields.items()}
    assert fields["tokenizer.ggml.add_space_prefix"]


@pytest.mark.parametrize("name", ["lstrip", "rstrip", "single_word", "normalized"])
def test_tokens_that_are_not_looked_for_as_they_are(name: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece("normalizer")
    tokenizer.add_special_tokens([AddedToken("<turn>", **{"normalized": False, name: True})])
    refused(with_tokenizer(tmp_path, tokenizer), f"'<turn>' has {name}, .* exact text")


def change(tokenizer: Tokenizer, **model: object) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= model
    return Tokenizer.from_str(json.dumps(content))


def test_what_llama_cpp_would_merge_and_tokenizer_json_does_not(tmp_path: Path) -> None:
    tokenizer = sentencepiece("never")
    content = json.loads(tokenizer.to_str())
    merges = [pair for pair in content["model"]["merges"] if pair != ["th", "er"]]
    refused(with_tokenizer(tmp_path, change(tokenizer, merges=merges)), "does not merge 'th' and")


def test_bytes_without_a_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece("never")
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocab["▁th"] = vocab.pop("<0x7F>")
    refused(with_tokenizer(tmp_path, change(tokenizer, vocab=vocab)), "no token <0x7F>")


def test_whole_texts_that_are_tokens(tmp_path: Path) -> None:
    tokenizer = change(sentencepiece("never"), ignore_merges=True)
    refused(with_tokenizer(tmp_path, tokenizer), "ignore_merges in no tokenizer of this kind")


def test_an_alphabet_with_holes(tmp_path: Path) -> None:
    tokenizer = train("gpt-2")
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocab["qqq"] = vocab.pop("Ā")
    tokenizer = change(tokenizer, vocab=vocab, unk_token="<|endoftext|>")
    refused(with_tokenizer(tmp_path, tokenizer), "no tokens for some bytes")


def test_types_and_special_tokens(tmp_path: Path) -> None:
    dense = with_tokenizer(tmp_path, sentencepiece("never"), chat_template="{{ messages }}")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(written(dense)).fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kinds = dict(zip(tokens, types, strict=True))
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"]) == (unknown, control, byte)
    assert (kinds["▁o"], kinds[f"[PAD{len(tokens) - 1}]"]) == (normal, unused)
    assert len(set(tokens)) == len(tokens)
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert not fields["tokenizer.ggml.add_bos_token"]


def test_a_tokenizer_that_begins_texts(tmp_path: Path) -> None:
    tokenizer = train("gpt-2")
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    dense = with_tokenizer(tmp_path, tokenizer)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(written(dense)).fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.add_eos_token"]


def test_other_tokens_around_a_text_are_refused(tmp_path: Path) -> None:
    tokenizer = train("gpt-2")
    tokenizer.post_processor = TemplateProcessing("<pad> $A", None, [("<pad>", 0)])
    refused(with_tokenizer(tmp_path, tokenizer), "writes 'a' as <pad>, a, and llama.cpp puts only")


CHATML = "{% for m in messages %}{{ m.content }}<|endoftext|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "template", "keys"),
    [
        (None, None, {"eos": 2}),
        ([2], None, {"eos": 2}),
        (40, None, {"eos": 2, "eot": 40}),
        ([40, 41], None, {"eos": 2, "eot": 40, "eom": 41}),
        ([40], CHATML, {"eos": 2, "eot": 3, "eom": 40}),
        # llama.cpp knows it by its text.
        ([3, 40, 41], None, {"eos": 2, "eot": 40, "eom": 41}),
    ],
)
def test_every_token_that_ends_an_answer(eos, template, keys, tmp_path: Path) -> None:
    settings = {"chat_template": template} if template else {}
    dense = with_tokenizer(tmp_path, train("gpt-2"), **settings)
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    path = written(dense)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    names = {"eos", "eot", "eom"}
    present = {n: v for n in names if (v := fields.get(f"tokenizer.ggml.{n}_token_id")) is not None}
    assert present == keys
    pytest.importorskip("xllamacpp")
    stop = {2, *keys.values(), *(eos if isinstance(eos, list) else [])}
    with contextlib.closing(LlamaCpp(path, 64)) as engine:
        assert engine.ends([*sorted(stop), 50]) == [True] * len(stop) + [False]


def test_more_ends_than_llama_cpp_has_keys_for(tmp_path: Path) -> None:
    dense = with_tokenizer(tmp_path, train("gpt-2"))
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": [40, 41, 42]}))
    refused(dense, "4 tokens end an answer .* would not stop at '.', for a file can name three")


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "smollm", "normalizer", "never"])
def test_the_check_asks_llama_cpp(name: str, tmp_path: Path) -> None:
    """Right files pass; a file whose keys are those of another tokenizer does not."""
    pytest.importorskip("xllamacpp")
    made = train(name) if name in PRE_TOKENIZERS else sentencepiece(name)
    dense = with_tokenizer(tmp_path, made)
    wrong = {
        "gpt-2": {"tokenizer.ggml.pre": text("qwen2")},
        "qwen2": {"tokenizer.ggml.pre": text("gpt-2")},
        "smollm": {"tokenizer.ggml.pre": text("qwen2")},
        "normalizer": {"tokenizer.ggml.add_space_prefix": flag(False)},
        "never": {"tokenizer.ggml.add_space_prefix": flag(True)},
    }[name]
    tokenizer = load_tokenizer(dense)
    for metadata, passes in (({}, True), (wrong, False)):
        decoder = open_checkpoint(dense)
        contents = gguf_contents(decoder, GgufOptions(), "tiny")
        contents.metadata.update(metadata)
        write_gguf(decoder, contents, dense)
        with contextlib.closing(LlamaCpp(dense / "model.gguf", 64)) as engine:
            check = check_tokens(engine, tokenizer)
            ends = check_ends(engine, tokenizer, (2, 50) if metadata else (2,))
        assert check.passed == passes, check.detail
        assert ends.passed == passes
        assert passes or ("expected" in check.detail and "\n" not in check.detail)


def refused(dense: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        written(dense)
    assert "\n" not in str(caught.value)


def test_another_pre_tokenizer_is_named(tmp_path: Path) -> None:
    tokenizer = train("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), _BYTES])
    refused(with_tokenizer(tmp_path, tokenizer), "no known name .* 'Punctuation'")


@pytest.mark.parametrize("name", ["gpt-2", "qwen2"])
def test_whole_words_make_another_name(name: str) -> None:
    content = json.loads(train(name).to_str())
    content["model"]["ignore_merges"] = True
    with pytest.raises(ModelError, match="ignore_merges"):
        pre_tokenizer_name(content)


def test_a_normaliser_is_refused(tmp_path: Path) -> None:
    tokenizer = train("gpt-2")
    tokenizer.normalizer = normalizers.Lowercase()
    refused(with_tokenizer(tmp_path, tokenizer), "does not normalise text")


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    from factories import make_checkpoint

    dense = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)
    refused(dense, "merges nothing")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    dense = make("llama-mha-tied", tmp_path)
    train("gpt-2").save(str(dense / "tokenizer.json"))
    refused(dense, "the tokenizer has token .* 329, .* vocab_size 263, so ids up to 262")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    dense = make("llama-mha-tied", tmp_path)
    (dense / "tokenizer.json").unlink()
    refused(dense, "no tokenizer")
