"""`--dequantize`: what the stored bits stand for, once, in the cache; or one line on why not."""

from __future__ import annotations

import json
import re

import pytest
import torch
from factories import make_checkpoint, random_layers, read_config, shape_of
from old_transformers import FP8, but_in_old, since_5
from quantised_models import Quantised, fp8, mxfp4, mxfp8, packed
from safetensors.torch import load_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app
from spp_export.common.errors import ModelError, OutputError, ResourceError, SppError, UsageError
from spp_export.evaluation.harness.yardsticks import quantised_bits, yardsticks
from spp_export.models import dequantise, quantised
from spp_export.models.dequantise import dequantised, find_model
from spp_export.models.hub import ModelLocation, hub_id, model_options, stored_model
from spp_export.models.quantised import METHODS, check_not_quantised, quant_method
from spp_export.models.session import open_session
from spp_export.planning import Plan


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def place_of(made: Quantised) -> ModelLocation:
    return dequantised(ModelLocation(made.path, "org/name"))


def assert_meant(made: Quantised, found: dict[str, torch.Tensor]) -> None:
    """Weights are what they stand for in float64, in float32 and then in the model's dtype; the
    others are unchanged."""
    packed_names = {f"{name}_blocks" for name in made.meant} | {f"{n}_scales" for n in made.meant}
    others = {
        name
        for name in made.stored
        if name not in made.meant
        and name not in packed_names
        and not name.endswith(("_scale_inv", ".qweight", ".qzeros", ".scales", ".g_idx"))
    }
    assert set(found) == others | set(made.meant)
    for name in others:
        assert torch.equal(found[name], made.stored[name]), name
    for name, meant in made.meant.items():
        assert torch.equal(found[name], meant.float().to(found[name].dtype)), name


CASES = {
    "FP8 in blocks": lambda path: fp8(path),
    "FP8 in flat blocks": lambda path: fp8(path, (16, 32)),
    "FP8 with one scale": lambda path: fp8(path, None),
    "FP8 with tied embeddings": lambda path: fp8(path, tied=True),
    "MXFP8": mxfp8,
    "MXFP4 of gpt-oss": mxfp4,
    "GPTQ": lambda path: packed(path, "gptq"),
    "GPTQ in another order": lambda path: packed(path, "gptq", shuffled=True),
    "GPTQ of 8 bits": lambda path: packed(path, "gptq", bits=8),
    "GPTQ of 2 bits": lambda path: packed(path, "gptq", bits=2),
    "AWQ": lambda path: packed(path, "awq"),
}


def those_of(cases):
    return but_in_old(cases, {name for name in cases if "FP8" in name}, FP8)


@pytest.mark.parametrize("case", those_of(CASES))
def test_weights_are_what_their_bits_stand_for(tmp_path, case):
    made = CASES[case](tmp_path)
    place = place_of(made)
    assert_meant(made, load_file(place.path / "model.safetensors"))
    expected = read_config(made.path)
    title = METHODS[expected.pop("quantization_config")["quant_method"]].title
    assert read_config(place.path) == expected
    assert place.name == f"org/name (dequantised from {title})"
    others = {"tokenizer.json", "tokenizer_config.json"}
    for name in others & {path.name for path in made.path.iterdir()}:
        assert (place.path / name).read_bytes() == (made.path / name).read_bytes()


@since_5(FP8)
def test_it_is_done_once_until_the_source_changes(tmp_path, cache, monkeypatch):
    made = fp8(tmp_path)
    first = find_model(str(made.path), dequantize=True)
    before = (first.path / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(dequantise, "_write", None)
        assert find_model(str(made.path), dequantize=True) == first
    assert [path for path in cache.iterdir() if path.is_dir()] == [first.path]
    # A damaged copy is made anew.
    (first.path / "model.safetensors").write_bytes(b"cut off")
    assert find_model(str(made.path), dequantize=True) == first
    assert_meant(made, load_file(first.path / "model.safetensors"))
    assert (first.path / "model.safetensors").stat().st_mtime_ns > before
    made.stored["model.norm.weight"] = made.stored["model.norm.weight"] * 2
    made.save()
    second = find_model(str(made.path), dequantize=True)
    assert second.path != first.path
    assert_meant(made, load_file(second.path / "model.safetensors"))


@since_5(FP8)
def test_the_cache_shows_and_removes_it(tmp_path):
    place = place_of(fp8(tmp_path))
    (entry,) = spp_export.cache().files
    size = sum(path.stat().st_size for path in place.path.iterdir())
    assert (entry.kind, entry.model, entry.nbytes) == ("models", place.name, size)
    assert stored_model(place.name) == place.path
    assert open_session(str(place.path)).source.name == place.name
    removed = spp_export.cache(clear=True, model=place.name).removed
    assert [file.path for file in removed] == [place.path]
    assert not place.path.exists()
    assert stored_model(place.name) is None


def test_its_name_says_where_it_comes_from():
    name = "org/name (dequantised from FP8)"
    assert hub_id(name) == "org/name"
    assert model_options(name) == ("--model", "org/name", "--dequantize")
    assert model_options("org/name") == ("--model", "org/name")


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        pytest.param(fp8, 8, marks=since_5(FP8)),
        (lambda path: packed(path, "gptq"), 4),
    ],
)
def test_it_counts_as_quantised_in_comparisons(tmp_path, make, bits):
    session = open_session(str(make(tmp_path).path), dequantize=True)
    assert quantised_bits(session.source) == bits
    assert yardsticks(session) == ("bf16",)


@since_5(FP8)
def test_commands_slice_it(tmp_path):
    made = fp8(tmp_path)
    model = str(made.path)
    source = open_session(model, dequantize=True).source
    shown = spp_export.show(model, dequantize=True)
    assert shown.facts["fingerprint"] == source.fingerprint
    assert shown.facts["model"] == "dense (dequantised from FP8)"
    layers = tuple(random_layers(shape_of(find_model(model, dequantize=True).path), 0))
    plan = Plan(source.fingerprint, source.name, "per-layer", "none", layers)
    result = spp_export.export(plan=plan, output=tmp_path / "slim", model=model, dequantize=True)
    assert result.report["passed"]
    assert spp_export.verify(tmp_path / "slim", model=model, dequantize=True).passed
    assert spp_export.load(model, plan, dequantize=True).config.num_hidden_layers == 2


def config_of(method):
    flags = {"bitsandbytes_4bit": "load_in_4bit", "bitsandbytes_8bit": "load_in_8bit"}
    if method in flags:
        return {"quantization_config": {"quant_method": "bitsandbytes", flags[method]: True}}
    return {"quantization_config": {"quant_method": method}}


def test_every_method_of_transformers_is_known():
    assert set(AUTO_QUANTIZER_MAPPING) <= set(METHODS)


@pytest.mark.parametrize("method", [*METHODS, "a-new-one"])
def test_each_is_refused_with_what_to_do(tmp_path, cache, method):
    config = config_of(method)
    assert quant_method(config) == method
    assert quant_method({"text_config": config}) == method
    with pytest.raises(ModelError) as error:
        check_not_quantised(config)
    message = str(error.value)
    assert "\n" not in message
    assert "hf download ORG/NAME" in message
    known = METHODS.get(method)
    assert f"by {known.title} " in message if known else "'a-new-one'" in message
    assert ("--dequantize" in message) == (known is not None and known.way is not None)
    if known is None or known.way is None:
        path = make_checkpoint(tmp_path, "llama", kv_heads=1, query_heads=1)
        (path / "config.json").write_text(json.dumps(read_config(path) | config))
        with pytest.raises(ModelError, match=re.escape(message)):
            find_model(str(path), dequantize=True)
        assert not cache.exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package compressed-tensors\. Run: .*install "):
        check_not_quantised(config_of("compressed-tensors"))


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, 4, "awq", {"quant_method": None}])
def test_what_says_no_method_is_refused(settings):
    with pytest.raises(ModelError, match=r"quantised .*quantization_config"):
        check_not_quantised({"quantization_config": settings})


def test_a_model_that_is_not_quantised_is_refused(tmp_path):
    path = make_checkpoint(tmp_path, "llama", kv_heads=1, query_heads=1)
    with pytest.raises(UsageError, match=r"dense: is not quantised\. Drop --dequantize"):
        find_model(str(path), dequantize=True)
    with pytest.raises(UsageError, match="is not quantised"):
        spp_export.show(path, dequantize=True)


def test_a_family_that_is_not_sliced_is_refused_before_the_work(tmp_path, cache):
    made = fp8(tmp_path)
    config = read_config(made.path) | {"model_type": "unheard_of"}
    (made.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unheard_of"):
        find_model(str(made.path), dequantize=True)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "error"), [("free_space", OutputError), ("free_memory", ResourceError)]
)
def test_room_is_looked_for_beforehand(tmp_path, cache, monkeypatch, name, error):
    monkeypatch.setattr(dequantise, name, lambda *_: 1000)
    monkeypatch.setattr(dequantise, "_by_transformers", None)
    with pytest.raises(error, match=r"0.0 GB are free"):
        place_of(fp8(tmp_path))
    assert leftovers(cache) == []


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


WEIGHT = "model.layers.0.self_attn.q_proj.weight"
MODULE = WEIGHT.removesuffix(".weight")
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def no_number(made):
    made.stored[f"{WEIGHT}_scale_inv"][0, 0] = float("nan")


def beyond(made):
    made.stored[f"{MODULE}.g_idx"][3] = 9


def narrow(made):
    made.stored[f"{MODULE}.scales"] = made.stored[f"{MODULE}.scales"][:, :-1]


def scales_of(shape):
    def change(made):
        made.stored[f"{WEIGHT}_scale_inv"] = torch.ones(shape)

    return change


HOSTILE = {
    "FP8 without scales": (fp8, lambda made: made.stored.pop(f"{WEIGHT}_scale_inv"), {}, "scale"),
    "FP8 with other blocks": (fp8, None, {"weight_block_size": [16, 16]}, "expected .4, 6."),
    "FP8 with blocks that do not fit": (fp8, None, {"weight_block_size": [30, 32]}, "divide"),
    "FP8 with default blocks": (fp8, None, {"weight_block_size": [128, 128]}, "divide"),
    "FP8 with empty blocks": (fp8, None, {"weight_block_size": [0, 32]}, "above 0"),
    "FP8 with one size": (fp8, None, {"weight_block_size": [32]}, "two sizes"),
    "FP8 with words": (fp8, None, {"weight_block_size": "many"}, "two sizes"),
    "FP8 without blocks": (fp8, None, {"weight_block_size": None}, "do not|expected"),
    "FP8 with too few scales": (fp8, scales_of((1, 1)), {}, "expected"),
    "FP8 with scales of no number": (fp8, no_number, {}, "not finite"),
    "FP8 of an unknown scheme": (fp8, None, {"activation_scheme": "odd"}, "cannot be dequant"),
    "FP8 without a tensor": (
        fp8,
        lambda made: made.stored.pop("model.norm.weight"),
        {},
        "files hold",
    ),
    "FP8 with another tensor": (
        fp8,
        lambda made: made.stored.update({"model.more": torch.zeros(2)}),
        {},
        "model.more",
    ),
    "MXFP4 without scales": (mxfp4, lambda made: made.stored.pop(f"{EXPERTS}_scales"), {}, "."),
    "MXFP4 with other scales": (
        mxfp4,
        lambda made: made.stored.update(
            {f"{EXPERTS}_scales": torch.zeros(4, 3, 2, dtype=torch.uint8)}
        ),
        {},
        ".",
    ),
    "GPTQ without zero points": (
        lambda path: packed(path, "gptq"),
        lambda made: made.stored.pop(f"{MODULE}.qzeros"),
        {},
        "qzeros",
    ),
    "GPTQ of group 9": (lambda path: packed(path, "gptq"), beyond, {}, "group 9"),
    "GPTQ of narrow scales": (lambda path: packed(path, "gptq"), narrow, {}, "no weight of 4"),
    "GPTQ of 3 bits": (lambda path: packed(path, "gptq"), None, {"bits": 3}, "3 bits"),
    "GPTQ of other bits": (lambda path: packed(path, "gptq"), None, {"bits": 8}, "no weight of 8"),
    "GPTQ in no groups": (lambda path: packed(path, "gptq"), None, {"group_size": 0}, "group_size"),
    "AWQ by another kernel": (lambda path: packed(path, "awq"), None, {"version": "gemv"}, "gemv"),
    "AWQ as GPTQ": (lambda path: packed(path, "awq"), None, {"quant_method": "gptq"}, "no weight"),
    "GPTQ as AWQ": (lambda path: packed(path, "gptq"), None, {"quant_method": "awq"}, "no weight"),
}


@pytest.mark.parametrize("case", those_of(HOSTILE))
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, cache, case):
    make, change, settings, words = HOSTILE[case]
    made = make(tmp_path)
    if change:
        change(made)
    made.save(**settings)
    with pytest.raises(SppError, match=words) as error:
        place_of(made)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ModelError)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 10**9}, {"num_hidden_layers": 10**12}, {"vocab_size": 10**13}],
    ids=str,
)
def test_a_config_of_a_giant_takes_no_memory(tmp_path, cache, changes):
    made = fp8(tmp_path)
    (made.path / "config.json").write_text(json.dumps(read_config(made.path) | changes))
    with pytest.raises(ModelError):
        place_of(made)
    assert leftovers(cache) == []


@since_5(FP8)
def test_the_command_line_has_it(tmp_path):
    made = fp8(tmp_path)
    shown = CliRunner().invoke(app, ["show", "--json", str(made.path), "--dequantize"])
    assert json.loads(shown.stdout)["facts"]["model"] == "dense (dequantised from FP8)"
