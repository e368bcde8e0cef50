"""Moments in the cache: right, mixed by weight, gathered once, and never another model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_checkpoint
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from spp_export.checkpoint.source import open_source
from spp_export.loader import load_dense
from spp_export.moments import Moments, gather

TEXTS = ("Gold melts at 1064 degrees.", "", "Why?", "Iron rusts in damp air, gold does not.")
OTHERS = ("A bond is a loan that can be sold.",)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("moments"), "qwen2", kv_heads=2, query_heads=4, layers=2
    )


def loader(path):
    return lambda: (load_dense(path, torch.float32), AutoTokenizer.from_pretrained(path))


def not_needed():
    raise AssertionError("the dense model was asked for")


@torch.no_grad()
def direct(path, texts):
    """Second moments, means and inverse squared norms per layer, one unpadded text at a time."""
    model = load_dense(path, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = [[] for _ in model.model.layers]
    streams = [[] for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=index: inputs[i].append(args[0][0])
        )
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, i=index: streams[i].append(args[0][0])
        )
    for text in filter(None, texts):
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    a = [torch.cat(layer).numpy() for layer in inputs]
    r = [torch.cat(layer).numpy() for layer in streams]
    return (
        [layer.T @ layer / len(layer) for layer in a],
        [layer.mean(0) for layer in a],
        [np.mean(1 / (layer**2).sum(1)) for layer in r],
    )


def test_one_collection_equals_direct_averages(dense):
    path = gather(open_source(dense), TEXTS, loader(dense))
    moments = Moments(((path, 1.0),))
    seconds, means, sensitivity = direct(dense, TEXTS)
    for layer, (second, mean) in enumerate(zip(seconds, means, strict=True)):
        found = moments.second(layer)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, second, rtol=1e-4, atol=1e-5 * second.max())
        np.testing.assert_allclose(moments.mean(layer), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.sensitivity(), sensitivity, rtol=1e-5)


def test_a_mixture_weighs_collections_not_tokens(dense):
    source = open_source(dense)
    paths = [gather(source, texts, loader(dense)) for texts in (TEXTS, OTHERS)]
    mixed = Moments(((paths[0], 0.3), (paths[1], 0.7)))
    one, other = direct(dense, TEXTS), direct(dense, OTHERS)
    second = 0.3 * one[0][1] + 0.7 * other[0][1]
    np.testing.assert_allclose(mixed.second(1), second, rtol=1e-4, atol=1e-5 * second.max())
    expected = 0.3 * one[1][0] + 0.7 * other[1][0]
    np.testing.assert_allclose(mixed.mean(0), expected, rtol=1e-4, atol=1e-5)
    expected = 0.3 * np.array(one[2]) + 0.7 * np.array(other[2])
    np.testing.assert_allclose(mixed.sensitivity(), expected, rtol=1e-5)


def test_the_second_time_costs_no_pass(dense, cache):
    source = open_source(dense)
    path = gather(source, TEXTS, loader(dense))
    assert cache in path.parents
    assert gather(source, TEXTS, not_needed) == path
    assert {file.name for file in path.parent.iterdir()} == {path.name}


@pytest.mark.parametrize("texts", [TEXTS[::-1], TEXTS[:2], (*TEXTS, "more")])
def test_other_texts_are_another_entry(dense, texts):
    source = open_source(dense)
    path = gather(source, TEXTS, loader(dense))
    assert gather(source, texts, loader(dense)) != path


def test_another_precision_is_another_entry(dense):
    source = open_source(dense)
    path = gather(source, TEXTS, loader(dense))
    assert gather(source, TEXTS, loader(dense), dtype="bfloat16") != path
    assert gather(source, TEXTS, not_needed, dtype="float32") == path


def test_another_model_of_the_same_sizes_is_another_entry(dense, tmp_path):
    """A fine-tuned model has the same config and the same tensors, by name, dtype and shape."""
    path = gather(open_source(dense), TEXTS, loader(dense))
    tuned = make_checkpoint(tmp_path, "qwen2", kv_heads=2, query_heads=4, layers=2, seed=1)
    source = open_source(tuned)
    assert source.fingerprint == open_source(dense).fingerprint
    other = gather(source, TEXTS, loader(tuned))
    assert other != path
    seconds, _, _ = direct(tuned, TEXTS)
    found = Moments(((other, 1.0),)).second(0)
    np.testing.assert_allclose(found, seconds[0], rtol=1e-4, atol=1e-5 * seconds[0].max())


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "others"])
def test_a_damaged_entry_is_made_again(dense, damage):
    source = open_source(dense)
    path = gather(source, TEXTS, loader(dense))
    whole = path.read_bytes()
    if damage == "others":
        save_file({"sensitivity": np.zeros(2)}, path)
    else:
        path.write_bytes({"truncated": whole[:-9], "empty": b"", "text": b"no tensors"}[damage])
    assert gather(source, TEXTS, loader(dense)) == path
    assert path.read_bytes() == whole


def test_an_interrupted_pass_leaves_nothing(dense, cache):
    class Interrupted(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def parameters(self, recurse=True):
            return self.model.parameters(recurse)

        def get_submodule(self, target):
            if target == "model":
                raise KeyboardInterrupt
            return self.model.get_submodule(target)

    def dense_model():
        model, tokenizer = loader(dense)()
        return Interrupted(model), tokenizer

    with pytest.raises(KeyboardInterrupt):
        gather(open_source(dense), TEXTS, dense_model)
    assert not list(cache.rglob("*.safetensors"))


def test_a_full_disk_leaves_nothing(dense, cache, monkeypatch):
    def no_space(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spp_export.moments.save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        gather(open_source(dense), TEXTS, loader(dense))
    assert not any(path.is_file() for path in cache.rglob("*"))
