"""Observers against transformers run on one unpadded text at a time, watched by our own hooks."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from factories import CASES, make_checkpoint, shape_of
from transformers import AutoTokenizer

from spp_export.calibration.activations import (
    MeanSquares,
    MixtureMoments,
    SecondMoments,
    StreamSensitivity,
    TextMeans,
    _home,
    channel_block,
    observe,
    token_batches,
)
from spp_export.common.progress import show_progress
from spp_export.models.families import FAMILIES
from spp_export.models.loader import load_dense

pytestmark = pytest.mark.thinned

TEXTS = (
    "Benzene is aromatic.",
    "",
    "x",
    "The integral of e^-x from 0 to infinity is 1; of its square, 1/2.",
    "Säure und Base",
    "What do bonds yield when rates fall?",
    "A much longer text than the others, so that every other row of its batch is mostly padding.",
)
PLACES = (
    "attention_input",
    "output",
    "attention",
    "residual",
    "mlp_input",
    "down",
    "stream",
)
REAL = tuple(i for i, text in enumerate(TEXTS) if text)


class Recorder:
    """Keeps every token it is shown, by layer and text."""

    def __init__(self, place):
        self.place = place
        self.seen = {}

    def see(self, layer, values, text_T):
        assert values.shape[0] == text_T.shape[0]
        for text in text_T.unique().tolist():
            assert (layer, text) not in self.seen, "a text came twice"
            self.seen[layer, text] = values[text_T == text].clone()


@contextmanager
def watched(model):
    """What every layer's parts read and write, by our own hooks: lists of [T,*], one per layer."""
    seen = {name: [] for name in ("input", "attention", "output", "normed", "mlp", "down", "after")}
    handles = []
    for layer in model.model.layers:
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: seen["input"].append((args or kwargs["hidden_states"])[0]),
                with_kwargs=True,
            ),
            layer.self_attn.register_forward_hook(
                lambda _, args, output: seen["attention"].append(output[0])
            ),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args: seen["output"].append(args[0])
            ),
            # The values of a module's neighbour, where there is one, rather than its own input.
            layer.input_layernorm.register_forward_hook(
                lambda _, args, output: seen["normed"].append(output[0])
            ),
            layer.post_attention_layernorm.register_forward_hook(
                lambda _, args, output: seen["mlp"].append(output[0])
            ),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args: seen["down"].append(args[0][0])
            ),
            layer.mlp.register_forward_hook(
                lambda _, args, output: seen["after"].append(output[0])
            ),
        ]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def one_by_one(model, tokenizer, texts):
    """Activations {place: {(layer, text): [T,*]}} of each text alone, without any padding."""
    found = {place: {} for place in PLACES}
    for index in (i for i, text in enumerate(texts) if text):
        ids = torch.tensor([tokenizer(texts[index])["input_ids"]])
        with watched(model) as seen:
            model(ids, use_cache=False)
        for layer in range(model.config.num_hidden_layers):
            stream, attention, output = (
                seen[name][layer].squeeze(0) for name in ("input", "attention", "output")
            )
            found["residual"][layer, index] = stream + attention
            found["attention"][layer, index] = attention
            found["output"][layer, index] = output
            found["stream"][layer, index] = stream + attention + seen["after"][layer]
            for place, name in (("attention_input", "normed"), ("mlp_input", "mlp"), ("down",) * 2):
                found[place][layer, index] = seen[name][layer]
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def watched_model(request, tmp_path_factory):
    """A float64 model of each kind, its tokenizer, family, shape, and what we saw it do."""
    path = request.param.make(tmp_path_factory.mktemp("observed"))
    model, shape = load_dense(path, torch.float64), shape_of(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = one_by_one(model, tokenizer, TEXTS)
    return model, tokenizer, FAMILIES[shape.model_type], shape, expected


def everything(by_text, layer):
    """All tokens of a layer [T,*]."""
    return torch.cat([by_text[layer, i] for i in REAL])


@pytest.mark.parametrize("budget", [1, 150, 4096])
def test_observers_see_the_real_tokens_and_nothing_else(watched_model, budget):
    model, tokenizer, family, shape, expected = watched_model
    recorders = [Recorder(place) for place in expected]
    batches = token_batches(tokenizer, TEXTS, batch_tokens=budget)
    observe(model, family, batches, recorders)
    for recorder in recorders:
        wanted = expected[recorder.place]
        assert recorder.seen.keys() == wanted.keys()
        assert len(wanted) == shape.num_layers * len(REAL)
        for key, values in wanted.items():
            torch.testing.assert_close(recorder.seen[key], values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("place", ["residual", "attention"])
def test_text_means_are_means_over_each_texts_tokens(watched_model, place):
    model, tokenizer, family, shape, expected = watched_model
    means = TextMeans(place, len(TEXTS), shape.num_layers, shape.hidden_size)
    observe(model, family, token_batches(tokenizer, TEXTS), [means])
    found = means.values
    assert found.dtype == np.float32
    assert (found[1] == 0).all(), "the empty text"
    for (layer, text), values in expected[place].items():
        np.testing.assert_allclose(found[text, layer], values.mean(0), rtol=1e-6, atol=1e-7)


def test_second_moments_are_sums_over_tokens(watched_model):
    model, tokenizer, family, shape, expected = watched_model
    width = shape.query_heads * shape.head_dim
    moments = SecondMoments(shape.num_layers, width)
    observe(model, family, token_batches(tokenizer, TEXTS), [moments])
    assert moments.tokens == sum(len(TEXTS[i].encode()) for i in REAL)
    for layer in range(shape.num_layers):
        products = torch.zeros(width, width, dtype=torch.float64)
        for token in everything(expected["output"], layer):
            products += torch.outer(token, token)
        sums = everything(expected["output"], layer).sum(0)
        scale = float(products.diagonal().max())
        torch.testing.assert_close(
            moments.products(layer)[0].double(), products, rtol=1e-5, atol=1e-6 * scale
        )
        torch.testing.assert_close(moments.sums[layer].double(), sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", [96, 50, 32, 7])
def test_blocks_are_the_diagonal_blocks_of_the_whole_matrix(watched_model, block):
    model, tokenizer, family, shape, expected = watched_model
    blocks = SecondMoments(shape.num_layers, shape.channels, place="down", block=block)
    observe(model, family, token_batches(tokenizer, TEXTS), [blocks])
    count = math.ceil(shape.channels / block)
    for layer in range(shape.num_layers):
        values = everything(expected["down"], layer)
        whole = torch.zeros(count * block, count * block, dtype=torch.float64)
        whole[: shape.channels, : shape.channels] = values.T @ values
        found = blocks.products(layer).double()
        assert found.shape == (count, block, block)
        scale = float(whole.diagonal().max())
        for i in range(count):
            wanted = whole[i * block : (i + 1) * block, i * block : (i + 1) * block]
            torch.testing.assert_close(found[i], wanted, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("channels", "block"),
    [(96, 96), (1536, 1536), (1537, 769), (3072, 1536), (11008, 1376), (18944, 1458)],
)
def test_blocks_are_the_fewest_of_at_most_1536_channels(channels, block):
    assert channel_block(channels) == block
    count = math.ceil(channels / block)
    assert count == math.ceil(channels / 1536)
    assert block * count - channels < count, "the blocks are nearly equal"


@pytest.mark.parametrize(("width", "block"), [(500, 500), (2000, 2000), (2900, 2000), (700, 600)])
def test_what_is_summed_in_halves_is_whole(width, block):
    """Of wide matrices one half is multiplied, a block of rows at a time."""
    values = torch.randn(2, 20, width, generator=torch.Generator().manual_seed(0))
    second = SecondMoments(1, width, block=block)
    mixture = MixtureMoments([0], width, torch.ones(1))
    for part in values:
        for observer in (second, mixture):
            observer.see(0, part, torch.zeros(len(part), dtype=torch.long))
    rows = values.flatten(0, 1).double()
    wanted = rows.T @ rows
    found = second.products(0)
    for index, start in enumerate(range(0, width, block)):
        end = min(start + block, width)
        own = found[index, : end - start, : end - start].double()
        torch.testing.assert_close(own, wanted[start:end, start:end], rtol=1e-5, atol=1e-4)
        assert not found[index, end - start :].any()
        assert not found[index, :, end - start :].any()
    torch.testing.assert_close(mixture.released(0).double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_layer_never_seen_has_moments_of_zero():
    assert (SecondMoments(1, 6, block=4).products(0) == torch.zeros(2, 4, 4)).all()


@pytest.mark.parametrize("place", ["attention_input", "mlp_input"])
def test_mean_squares_are_sums_over_tokens(watched_model, place):
    model, tokenizer, family, shape, expected = watched_model
    squares = MeanSquares(place, shape.num_layers, shape.hidden_size)
    observe(model, family, token_batches(tokenizer, TEXTS), [squares])
    for layer in range(shape.num_layers):
        wanted = sum(token**2 for token in everything(expected[place], layer))
        torch.testing.assert_close(squares.sums[layer].double(), wanted, rtol=1e-5, atol=1e-5)


def test_sums_of_a_crowded_accelerator_live_on_the_cpu(monkeypatch):
    """10 GB in all; 2.5 GB have to stay free."""
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 10**9, 10**10))
    assert _home(card, 4 * 10**8) == card
    assert _home(card, 6 * 10**8) == cpu
    assert _home(cpu, 4 * 10**8) == cpu


@pytest.mark.parametrize("place", ["residual", "stream"])
def test_stream_sensitivity_is_the_sum_of_inverse_squared_norms(watched_model, place):
    model, tokenizer, family, shape, expected = watched_model
    stream = StreamSensitivity(shape.num_layers, f"{place}_per_write")
    observe(model, family, token_batches(tokenizer, TEXTS), [stream])
    for layer in range(shape.num_layers):
        wanted = sum(1 / float(token @ token) for token in everything(expected[place], layer))
        assert float(stream.sums[layer]) == pytest.approx(wanted, rel=1e-9)


def test_a_stream_of_zeros_is_no_division_by_zero():
    stream = StreamSensitivity(1)
    stream.see(0, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    assert stream.sums.isfinite().all()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = make_checkpoint(
        tmp_path_factory.mktemp("small"), "llama", kv_heads=2, query_heads=4, layers=2
    )
    return load_dense(path), AutoTokenizer.from_pretrained(path)


def hooks(model):
    """Hooks now registered anywhere in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_are_gone_after_an_exception(small, error, place):
    class Failing:
        def __init__(self):
            self.place = place

        def see(self, layer, values, text_T):
            assert hooks(model) > before
            if layer == 1:
                raise error("enough")

    model, tokenizer = small
    before = hooks(model)
    observers = [Failing(), *(Recorder(p) for p in PLACES)]
    with pytest.raises(error, match="enough"):
        observe(model, FAMILIES["llama"], token_batches(tokenizer, TEXTS), observers)
    assert hooks(model) == before


def test_hooks_are_gone_after_a_pass_and_gradients_are_never_kept(small):
    model, tokenizer = small
    before = hooks(model)
    recorder = Recorder("output")
    observe(model, FAMILIES["llama"], token_batches(tokenizer, TEXTS), [recorder])
    assert hooks(model) == before
    assert not any(values.requires_grad for values in recorder.seen.values())


def test_the_language_model_head_is_not_run(small):
    """Logits of a large vocabulary would be the largest tensor of the pass, and nobody looks."""
    model, tokenizer = small

    def refuse(*_):
        raise AssertionError("the head ran")

    handle = model.lm_head.register_forward_pre_hook(refuse)
    try:
        batches = token_batches(tokenizer, TEXTS)
        observe(model, FAMILIES["llama"], batches, [Recorder("output")])
    finally:
        handle.remove()


def test_progress_ends_at_the_number_of_real_tokens(small):
    model, tokenizer = small
    reported = []

    @contextmanager
    def progress(description, total):
        reported.append((description, total))
        yield reported.append

    batches = token_batches(tokenizer, TEXTS, batch_tokens=60)
    with show_progress(progress):
        observe(model, FAMILIES["llama"], batches, [], description="looking")
    assert reported[0] == ("looking", sum(len(text.encode()) for text in TEXTS))
    assert reported[1:] == sorted(reported[1:])
    assert reported[-1] == reported[0][1]
