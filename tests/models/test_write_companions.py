"""What is written beside weights: every engine finds a tokenizer.json, from whatever files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import make_checkpoint, random_layers, read_config, shape_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

import spp_export
from spp_export import OnnxOptions
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.tokenizer import write_companions
from spp_export.planning import Plan

TEXTS = ["Ammonia, NH3", " two  spaces ", "naïve 12", "<|endoftext|>there"]


def source(tmp_path: Path, *, settings: dict[str, object] | None) -> Path:
    """A Qwen2 model with only vocab.json and merges.txt, and perhaps a tokenizer_config.json."""
    dense = make_checkpoint(tmp_path, "qwen2", kv_heads=2, query_heads=4)
    path = dense / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"he": 260, "re": 261}
    content["model"]["merges"] += [["h", "e"], ["r", "e"]]
    Tokenizer.from_str(json.dumps(content)).model.save(str(dense))
    path.unlink()
    (dense / "tokenizer_config.json").unlink()
    if settings is not None:
        (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    return dense


SETTINGS = {
    "none": None,
    "no class": {"model_max_length": 77},
    "its own": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_an_export_has_a_tokenizer_that_any_reader_takes(tmp_path, name, layout):
    dense = source(tmp_path, settings=SETTINGS[name])
    shape = shape_of(dense)
    layers = random_layers(shape, 5) if layout == "per-layer" else None
    plan = Plan(
        open_source(dense).fingerprint,
        "dense",
        layout,
        "none",
        layers or (random_layers(shape, 5)[0],) * shape.num_layers,
    )
    out = tmp_path / "slim"
    spp_export.export(output=out, model=str(dense), plan=plan)
    expected = AutoTokenizer.from_pretrained(dense)(TEXTS)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"] == expected
    plain = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [plain.encode(text).ids for text in TEXTS] == expected
    settings = json.loads((out / "tokenizer_config.json").read_text())
    # A class that transformers has for the model type of the source only is not named.
    kept = layout == "uniform" and name == "its own"
    expected_class = "Qwen2Tokenizer" if kept else "PreTrainedTokenizerFast"
    wanted = (SETTINGS[name] or {}) | {"tokenizer_class": expected_class}
    assert wanted.items() <= settings.items()


@pytest.mark.parametrize("name", SETTINGS)
def test_genai_reads_the_tokenizer_of_such_a_model(tmp_path, name):
    og = pytest.importorskip("onnxruntime_genai")
    dense = source(tmp_path, settings=SETTINGS[name])
    out = tmp_path / "onnx"
    out.mkdir()
    write_onnx(dense, out, OnnxOptions())
    tokenizer = og.Tokenizer(og.Model(str(out)))
    expected = AutoTokenizer.from_pretrained(dense)(TEXTS)["input_ids"]
    assert [list(tokenizer.encode(text)) for text in TEXTS] == expected


def test_a_class_that_reads_tokenizer_json_otherwise_travels_as_what_it_makes(tmp_path):
    """transformers 5 gives Llama's class pre-tokenizers of its own, by the name of the model type,
    which is another one where layers differ."""
    dense = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=False)
    inner.decoder = decoders.Metaspace("▁", "never")
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(dense / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["a b", " ab", "a</s>a"]
    expected = AutoTokenizer.from_pretrained(dense)(texts)["input_ids"]
    for model_type in ("llama", "spp_llama"):
        out = tmp_path / model_type
        out.mkdir()
        config = read_config(dense) | {"model_type": model_type}
        write_companions(dense, out, config)
        (out / "config.json").write_text(json.dumps(config))
        assert AutoTokenizer.from_pretrained(out)(texts)["input_ids"] == expected


def test_what_is_whole_is_copied_as_it_is(tmp_path):
    dense = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)
    out = tmp_path / "out"
    out.mkdir()
    write_companions(dense, out, read_config(dense))
    names = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (dense / name).read_bytes() for name in names)


def test_code_that_a_tokenizer_names_stays_behind(tmp_path):
    dense = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)
    path = dense / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["mine.T", None]}}))
    out = tmp_path / "out"
    out.mkdir()
    write_companions(dense, out, read_config(dense))
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings


def test_what_was_cut_and_padded_before_is_not_cut_by_others(tmp_path):
    dense = source(tmp_path, settings=None)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer(TEXTS, truncation=True, max_length=2, padding=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"]
    (tmp_path / "saved" / "config.json").write_text((dense / "config.json").read_text())
    (tmp_path / "saved" / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    write_companions(tmp_path / "saved", out, read_config(dense))
    content = json.loads((out / "tokenizer.json").read_text())
    assert (content["truncation"], content["padding"]) == (None, None)
