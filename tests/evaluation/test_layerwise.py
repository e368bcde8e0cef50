"""A model that runs from disk computes what the same model in memory does, to the last bit."""

from __future__ import annotations

import itertools
import json
import threading

import numpy as np
import pytest
import torch
from factories import (
    CASES,
    make_checkpoint,
    ragged_layers,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from pairs import each, few
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache
from untouched import IDS, compensation, plan_of

from spp_export.calibration.activations import (
    MeanSquares,
    SecondMoments,
    TextMeans,
    TokenBatch,
    observe,
)
from spp_export.calibration.moments import gather
from spp_export.common.errors import CheckpointError, ModelError, UsageError
from spp_export.common.progress import show_progress
from spp_export.evaluation.oracle import masked_dense
from spp_export.evaluation.parity import (
    check_cache,
    check_causality,
    check_parity,
    reference_logits,
)
from spp_export.evaluation.quality import measure_quality
from spp_export.models.checkpoint import reader
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES, Role
from spp_export.models.layerwise import logits_of_calls, open_layerwise, stream_of
from spp_export.models.loader import load_dense, load_slim
from spp_export.models.shape import resident_parameters

pytestmark = pytest.mark.thinned

TEXTS = ("Gold melts at 1064 degrees.", "", "Why?", "Iron rusts in damp air, gold does not.")
OWN = [torch.float64, torch.bfloat16]


class Checkpoints:
    """A case's dense checkpoint, and slim ones of each layout with the plans they follow."""

    def __init__(self, case, root):
        self.dense = case.make(root)
        self.shape = shape_of(self.dense)
        self.family = FAMILIES[self.shape.model_type]
        even = {"kv_heads": max(self.shape.kv_heads // 2, 1), "group_size": 1}
        self.plans = {
            "per-layer": random_layers(self.shape, 1),
            "ragged": ragged_layers(self.shape, 2),
            "uniform": uniform_layers(self.shape, 3, channels=48, **even),
        }
        self.slim = {
            layout: write_slim(root / layout, self.dense, layers, layout)
            for layout, layers in self.plans.items()
            if layout != "uniform" or self.family.stock_accepts(self.shape)(even["kv_heads"])
        }
        self._loaded = {}

    def models(self, layout=None, dtype=torch.float64):
        """The dense model, or a slim one, in memory and from disk: loaded once, changed by none."""
        if (layout, dtype) not in self._loaded:
            directory = self.slim[layout] if layout else self.dense
            load = load_slim if layout else load_dense
            self._loaded[layout, dtype] = load(directory, dtype), open_layerwise(directory, dtype)
        return self._loaded[layout, dtype]


@pytest.fixture(
    scope="module", params=few(CASES, lambda case: {case.family}), ids=lambda case: case.name
)
def checkpoints(request, tmp_path_factory):
    return Checkpoints(request.param, tmp_path_factory.mktemp("layerwise"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerwise")
    return make_checkpoint(folder, "llama", kv_heads=2, query_heads=4, layers=4, shards=3)


def padded_batch(lengths=(21, 13, 4), seed=1):
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return TokenBatch(ids * mask, mask, tuple(range(len(lengths))))


BATCHES = [padded_batch(), padded_batch((9, 9), seed=2)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def in_memory(model):
    """Elements of the parameters that are there."""
    return sum(p.numel() for p in model.parameters() if p.device.type != "meta")


def few_of(name, values):
    """Some of the cases with some of these values: every family, and every value."""
    return pytest.mark.parametrize(
        ("checkpoints", name),
        few(itertools.product(CASES, values), each),
        indirect=["checkpoints"],
        ids=str,
    )


@few_of("dtype", OWN)
def test_logits_are_those_of_the_model_in_memory(checkpoints, dtype):
    for layout in (None, *checkpoints.slim):
        whole, stream = checkpoints.models(layout, dtype)
        assert stream.config._attn_implementation == whole.config._attn_implementation
        with torch.no_grad():
            expected = whole(IDS, use_cache=False).logits
            assert torch.equal(stream(IDS, use_cache=False).logits, expected)
        calls = [{"input_ids": IDS[:, :n], "use_cache": False} for n in (37, 5, 1)]
        assert equal(logits_of_calls(stream, calls), logits_of_calls(whole, calls))
        assert in_memory(stream) == checkpoints.shape.hidden_size  # the last norm


@few_of("prompt", [1, 9])
def test_steps_of_one_decoding_go_through_the_layers_together(checkpoints, prompt):
    """Windows of six tokens included, which the prompt fills, or the steps."""
    for layout in (None, *checkpoints.slim):
        whole, stream = checkpoints.models(layout)
        steps = [IDS[:, :prompt], *IDS[:, prompt : prompt + 12].split(1, dim=1)]

        def calls(model, steps=steps):
            cache = DynamicCache(config=model.config)
            return [{"input_ids": s, "past_key_values": cache, "use_cache": True} for s in steps]

        assert equal(logits_of_calls(stream, calls(stream)), logits_of_calls(whole, calls(whole)))


@few_of("compensate", ["none", "weights", "bias"])
def test_every_check_finds_the_same(checkpoints, compensate):
    """All layouts, and projections with and without biases in the oracle's place."""
    for layout in checkpoints.slim:
        layers = checkpoints.plans[layout]
        projections = None
        if compensate != "none":
            projections = compensation(checkpoints.shape, layers)
            if compensate == "weights":
                projections = {key: type(p)(p.weight) for key, p in projections.items()}
        found = []
        for dense, slim in zip(checkpoints.models(), checkpoints.models(layout), strict=True):
            reference = reference_logits(
                dense, checkpoints.family, checkpoints.shape, plan_of(layers), BATCHES, projections
            )
            checks = (
                check_parity(slim, reference),
                check_causality(slim, BATCHES[0]),
                check_cache(slim, BATCHES[0], reference.rounding),
            )
            found.append((reference, checks))
        (whole, expected), (stream, checks) = found
        assert equal(whole.same, stream.same)
        assert equal(whole.exact, stream.exact)
        assert checks == expected
        assert checks[0].passed == (compensate == "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_wider_oracle_has_the_weights_of_the_narrower_one(dense, dtype):
    """Weights stored in fp32 are rounded to the model's dtype, and then in float64."""
    shape = shape_of(dense)
    layers = random_layers(shape, 1)
    whole, stream = load_dense(dense, dtype), open_layerwise(dense, dtype)
    arguments = (FAMILIES["llama"], shape, plan_of(layers), BATCHES, compensation(shape, layers))
    expected = reference_logits(whole, *arguments)
    found = reference_logits(stream, *arguments)
    assert equal(found.exact, expected.exact)
    assert equal(found.same, expected.same)
    assert found.rounding.usual > 0
    # and the model computes in its own again
    plain = [{"input_ids": IDS, "use_cache": False}]
    assert equal(logits_of_calls(stream, plain), logits_of_calls(whole, plain))


def test_a_mask_and_what_it_put_in_place_are_gone_afterwards(dense):
    shape = shape_of(dense)
    layers = random_layers(shape, 1)
    whole, stream = load_dense(dense), open_layerwise(dense, torch.float32)
    with masked_dense(
        stream, FAMILIES["llama"], shape, plan_of(layers), compensation(shape, layers)
    ):
        with torch.no_grad():
            masked = stream(IDS, use_cache=False).logits
        assert stream.model.layers[0].self_attn.o_proj.bias is None  # of no layer that has gone
    with torch.no_grad():
        plain = stream(IDS, use_cache=False).logits
        assert torch.equal(plain, whole(IDS, use_cache=False).logits)
    assert not torch.equal(masked, plain)


class Recorder:
    """Everything that it is shown, per layer in the order of texts."""

    def __init__(self, place):
        self.place, self.seen = place, {}

    def see(self, layer, values, text_T):
        self.seen.setdefault(layer, []).append((text_T.clone(), values.clone()))


PLACES = ["attention_input", "output", "attention", "residual", "mlp_input", "down", "stream"]


def test_observers_see_the_same(checkpoints):
    seen = []
    for model in checkpoints.models():
        recorders = [Recorder(place) for place in PLACES]
        observe(model, checkpoints.family, BATCHES, recorders)
        seen.append([recorder.seen for recorder in recorders])
    for expected, found in zip(*seen, strict=True):
        assert found.keys() == expected.keys()
        for layer, batches in expected.items():
            for one, other in zip(found[layer], batches, strict=True):
                assert equal(one, other)


def test_layers_are_done_one_after_the_other(dense):
    """A layer has been shown every batch before the next one begins; progress gets to the end."""
    order, done = [], []
    recorder = Recorder("stream")
    recorder.see = lambda layer, values, text_T: order.append(layer)

    class Progress:
        def __call__(self, description, total):
            self.total = total
            return self

        def __enter__(self):
            return done.append

        def __exit__(self, *_):
            pass

    progress = Progress()
    with show_progress(progress):
        observe(
            open_layerwise(dense, torch.float32),
            FAMILIES["llama"],
            BATCHES,
            [recorder],
            layer_done=lambda layer: order.append(f"{layer} done"),
        )
    assert order == [step for layer in range(4) for step in (layer, layer, f"{layer} done")]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(progress.total) == pytest.approx(38 + 18)


def test_sums_over_texts_are_the_same(dense):
    found = []
    for load in (load_dense, open_layerwise):
        means = TextMeans("residual", 3, 4, 64)
        squares, seconds = MeanSquares("output", 4, 64), SecondMoments(4, 64)
        model = load(dense, torch.float32)
        observe(model, FAMILIES["llama"], BATCHES, [means, squares, seconds])
        products = [seconds.products(layer) for layer in range(4)]
        found.append([torch.from_numpy(means.values), squares.sums, seconds.sums, *products])
        assert seconds.tokens == 56
    assert equal(*found)


def test_statistics_are_the_same_and_written_layer_by_layer(dense, tmp_path, monkeypatch):
    source, tokenizer = open_source(dense), AutoTokenizer.from_pretrained(dense)
    kinds = ("attention", "mlp")
    files = []
    for load in (load_dense, open_layerwise):
        monkeypatch.setenv("SPP_CACHE", str(tmp_path / load.__name__))
        model = load(dense, torch.float32)
        collection = gather(source, TEXTS, kinds, lambda model=model: (model, tokenizer))
        files.append({kind: path.read_bytes() for kind, path in collection.parts.items()})
        assert np.isfinite(collection.blocks("attention", 3)).all()
    assert files[0] == files[1]


def test_gradients_are_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    with pytest.raises(UsageError, match="gradients need every weight in memory"):
        gather(
            open_source(dense),
            TEXTS,
            ["gradients"],
            lambda: (open_layerwise(dense, torch.float32), tokenizer),
        )


def test_quality_is_the_same(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.dense)
    whole, streams = zip(checkpoints.models(), checkpoints.models("per-layer"), strict=True)
    expected = measure_quality(*whole, tokenizer, TEXTS)
    assert measure_quality(*streams, tokenizer, TEXTS) == expected
    assert measure_quality(whole[0], streams[1], tokenizer, TEXTS) == expected
    assert expected.tokens > 50


def test_weights_are_read_once_for_all_calls_and_one_layer_is_in_place(dense, monkeypatch):
    reads, held, real = [], [], reader._opened
    shape = shape_of(dense)
    model = open_layerwise(dense, torch.float32)

    def counting(tensor):
        reads.append(tensor.name)
        return real(tensor)

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: held.append(in_memory(model)))
    monkeypatch.setattr(reader, "_opened", counting)
    calls = [{"input_ids": IDS[:, :n], "use_cache": False} for n in (3, 2, 4)]
    assert len(list(logits_of_calls(model, calls))) == 3
    layers = [name for name in reads if ".layers." in name]
    assert len(layers) == len(set(layers)) == 9 * 4
    assert reads.count("lm_head.weight") == 1
    assert reads.count("model.embed_tokens.weight") == 3 + 2 + 4  # rows
    outside = shape.parameters(())
    layer = shape.parameters(shape.layers[:1]) - outside
    assert set(held) == {layer + shape.hidden_size}
    assert resident_parameters(shape) == layer + max(layer, shape.vocab_size * shape.hidden_size)


def test_what_is_ahead_is_read_on_a_thread_and_given_up_when_a_run_ends_early(dense, monkeypatch):
    threads, real = set(), reader._opened

    def noting(tensor):
        threads.add(threading.current_thread().name)
        return real(tensor)

    monkeypatch.setattr(reader, "_opened", noting)
    model = open_layerwise(dense, torch.float32)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        next(logits_of_calls(model, [{"input_ids": IDS, "use_cache": False}]))
    handle.remove()
    assert {name.split("_")[0] for name in threads} == {"MainThread", "spp-layers"}
    whole = load_dense(dense)
    plain = [{"input_ids": IDS, "use_cache": False}]
    assert equal(logits_of_calls(model, plain), logits_of_calls(whole, plain))
    assert stream_of(model) is not None
    assert stream_of(whole) is None


def test_the_head_goes_when_nobody_asks_for_the_rest(dense):
    model = open_layerwise(dense, torch.float32)
    calls = [{"input_ids": IDS, "use_cache": False}] * 3
    logits = logits_of_calls(model, calls)
    next(logits)
    assert in_memory(model) > model.lm_head.out_features * 64
    logits.close()
    assert in_memory(model) == 64


def damaged(dense, target, change):
    """A copy of a one-file checkpoint with changed tensors or config."""
    target.mkdir()
    tensors = load_file(dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"), CheckpointError),
        (lambda t, c: t.update({"model.layers.0.extra": torch.zeros(3)}), CheckpointError),
        (lambda t, c: t.update({"lm_head.weight": torch.zeros(3, 64)}), CheckpointError),
        (lambda t, c: c.update(model_type="gpt2"), ModelError),
        (lambda t, c: c.update(hidden_act="no such thing"), CheckpointError),
    ],
    ids=["missing", "unknown", "shape", "family", "config"],
)
def test_damaged_checkpoints_are_refused_before_anything_is_computed(tmp_path, change, error):
    whole = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4, layers=2)
    with pytest.raises(error) as caught:
        open_layerwise(damaged(whole, tmp_path / "damaged", change), torch.float32)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_not_finite_is_found_where_it_is_read(tmp_path):
    def spoil(tensors, config):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    whole = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4, layers=2)
    model = open_layerwise(damaged(whole, tmp_path / "damaged", spoil), torch.float32)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*not finite"):
        list(logits_of_calls(model, [{"input_ids": IDS, "use_cache": False}]))


def test_a_projection_that_does_not_fit_is_no_lasting_damage(dense):
    shape = shape_of(dense)
    layers = random_layers(shape, 1)
    wrong = compensation(shape, layers)
    wrong[1, Role.OUTPUT] = type(wrong[1, Role.OUTPUT])(torch.zeros(3, 3))
    model, whole = open_layerwise(dense, torch.float32), load_dense(dense)
    plain = [{"input_ids": IDS, "use_cache": False}]
    with (
        pytest.raises(RuntimeError),
        masked_dense(model, FAMILIES["llama"], shape, plan_of(layers), wrong),
    ):
        list(logits_of_calls(model, plain))
    assert equal(logits_of_calls(model, plain), logits_of_calls(whole, plain))


def test_logits_that_are_waited_for_leave_the_callers_gradients_alone(tmp_path):
    model = load_dense(CASES[0].make(tmp_path))
    calls = [{"input_ids": torch.tensor([[1, 2, 3]])}] * 2
    one, other = logits_of_calls(model, calls), logits_of_calls(model, calls)
    for pair in zip(one, other, strict=True):
        assert torch.is_grad_enabled()
        assert not any(logits.requires_grad for logits in pair)
    assert torch.is_grad_enabled()
