"""Models whose only tokenizer is SentencePiece's tokenizer.model, as of Llama 2 and Mistral."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from factories import make_checkpoint
from old_transformers import since_5
from tokenizers import Tokenizer

import spp_export
from spp_export.common.errors import ModelError
from spp_export.models.tokenizer import load_tokenizer

SAID = (
    "The acid reacts with the base, and gives a salt and water.",
    "Why does salt dissolve in water? It is polar.",
    "12 + 30 = 42; 3.14",
    "Über Straßen und Plätze",
)
TEXTS = [*SAID, "salt  in  water", " leading", "</s>the acid", "酸 🙂", ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAID * 20),
        model_writer=trained,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    root = tmp_path_factory.mktemp("sentencepiece")
    place = make_checkpoint(root, "llama", kv_heads=2, query_heads=4, vocab=320)
    (place / "tokenizer.json").unlink()
    (place / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))
    return place


def test_it_is_read_as_sentencepiece_reads_it(model):
    tokenizer = load_tokenizer(model)
    known = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    for text in SAID:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == known.encode(text), text


def test_a_graph_of_it_has_a_tokenizer_for_engines_that_know_no_other(model, tmp_path):
    spp_export.convert(model, tmp_path / "onnx", format="onnx")
    ours = load_tokenizer(model)
    written = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == ours(text)["input_ids"], text
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] in (2, [2])


@since_5("its LlamaTokenizer puts a space before every text, as llama.cpp does")
def test_what_llama_cpp_would_read_otherwise_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match=r"prepend_scheme first.* puts a space only before"):
        spp_export.convert(model, tmp_path / "gguf", format="gguf")
    assert not list(tmp_path.iterdir())
