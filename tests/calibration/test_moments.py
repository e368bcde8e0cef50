"""Statistics in the cache: right, mixed by weight, gathered once, and never another model's."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
from factories import make_checkpoint
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from spp_export.calibration import moments
from spp_export.calibration.activations import TextMeans, token_batches
from spp_export.calibration.mixture import WeightedTexts
from spp_export.calibration.moments import Moments, gather, gather_all, layer_weights
from spp_export.calibration.reading import dialogue_text
from spp_export.calibration.statistics import Axis, Gradients
from spp_export.calibration.whole import WholeMoments, passes
from spp_export.common.errors import OutputError
from spp_export.common.progress import show_progress
from spp_export.data.artifacts import Dialogue
from spp_export.domains.probe_model import Dense, with_gradients
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.loader import load_dense
from spp_export.models.session import open_session

# The models here have no experts.
KINDS = tuple(kind for kind in moments.KINDS if not kind.startswith("expert"))
TEXTS = ("Gold melts at 1064 degrees.", "", "Why?", "Iron rusts in damp air, gold does not.")
OTHERS = ("A bond is a loan that can be sold.",)
MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


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


class Passes:
    """Stands for the dense model and counts how often its decoder ran, and with gradients."""

    def __init__(self, path):
        self.forward = self.backward = 0
        self._loaded = loader(path)()
        self._loaded[0].model.register_forward_hook(self._count)

    def __call__(self):
        return self._loaded

    def _count(self, *_):
        if torch.is_grad_enabled():
            self.backward += 1
        else:
            self.forward += 1


@torch.no_grad()
def direct(path, texts):
    """Tokens [T,*] float64 that each place shows, {name: [per layer]}, one text at a time."""
    model = load_dense(path, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = ("q", "o", "gate", "down", "residual", "stream")
    seen = {name: [[] for _ in model.model.layers] for name in names}

    def record(rows, last=False):
        return lambda _, args, *output: rows.append((output[0] if last else args[0])[0])

    for index, layer in enumerate(model.model.layers):
        for name, module in (
            ("q", layer.self_attn.q_proj),
            ("o", layer.self_attn.o_proj),
            ("gate", layer.mlp.gate_proj),
            ("down", layer.mlp.down_proj),
            ("residual", layer.post_attention_layernorm),
        ):
            module.register_forward_pre_hook(record(seen[name][index]))
        layer.register_forward_hook(lambda _, args, output, i=index: after(seen, i, output))
    for text in filter(None, texts):
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    return {name: [torch.cat(rows).numpy() for rows in layers] for name, layers in seen.items()}


def after(seen, index, output):
    seen["stream"][index].append((output[0] if isinstance(output, tuple) else output)[0])


def second(values):
    return values.T @ values / len(values)


def inverse_square(values):
    return np.mean(1 / (values**2).sum(1))


def assert_close(found, expected):
    assert found.dtype == np.float32
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_one_collection_equals_direct_averages(dense):
    found = gather(open_source(dense), TEXTS, ("attention", "mlp"), loader(dense))
    moments = Moments(((found, 1.0),))
    seen = direct(dense, TEXTS)
    for layer in range(2):
        for of in (found, moments):
            assert_close(of.blocks("attention", layer), second(seen["o"][layer])[None])
            assert_close(of.mean("attention", layer), seen["o"][layer].mean(0))
            assert_close(of.blocks("mlp", layer), second(seen["down"][layer])[None])
            assert_close(of.mean("mlp", layer), seen["down"][layer].mean(0))
        assert_close(found.input_square("attention", layer), (seen["q"][layer] ** 2).mean(0))
        assert_close(found.input_square("mlp", layer), (seen["gate"][layer] ** 2).mean(0))
    for of in (found, moments):
        expected = [inverse_square(values) for values in seen["residual"]]
        np.testing.assert_allclose(of.sensitivity("attention"), expected, rtol=1e-5)
        expected = [inverse_square(values) for values in seen["stream"]]
        np.testing.assert_allclose(of.sensitivity("mlp"), expected, rtol=1e-5)


def test_many_channels_are_kept_in_blocks(dense, monkeypatch):
    """96 channels in blocks of at most 40 are three of 32; of at most 20, five of 20."""
    seen = direct(dense, TEXTS)
    for index, (most, count, size) in enumerate(((40, 3, 32), (20, 5, 20))):
        monkeypatch.setattr("spp_export.calibration.activations.CHANNEL_BLOCK", most)
        texts = (*TEXTS, *OTHERS[:index])  # another entry of the cache
        seen = direct(dense, texts)
        found = gather(open_source(dense), texts, ["mlp"], loader(dense))
        blocks = found.blocks("mlp", 1)
        whole = np.zeros((count * size,) * 2)
        whole[:96, :96] = second(seen["down"][1])
        places = [slice(i * size, (i + 1) * size) for i in range(count)]
        assert_close(blocks, np.stack([whole[place, place] for place in places]))
        mlp = found.layer_statistics(open_source(dense), 1).mlp
        assert_close(mlp.square, (seen["down"][1] ** 2).mean(0))


@pytest.mark.parametrize("together", [1, 2])
def test_whole_moments_of_a_mixture(dense, monkeypatch, together):
    """Of all channels, in as few passes as memory asks for: the sums of the texts one by one."""
    monkeypatch.setattr("spp_export.calibration.activations.CHANNEL_BLOCK", 20)
    monkeypatch.setattr(
        "spp_export.calibration.whole.free_memory", lambda kind: 4 * together * 4 * 96**2
    )
    session = open_session(str(dense))
    count = Passes(dense)
    session.__dict__["model"] = count()[0]
    assert passes(session, 2) == 2 // together
    parts = (WeightedTexts(TEXTS, 0.3, "one"), WeightedTexts(OTHERS, 0.7))
    whole = WholeMoments(session, parts, (0, 1))
    seen, others = direct(dense, TEXTS), direct(dense, OTHERS)
    for layer in (0, 1):
        expected = 0.3 * second(seen["down"][layer]) + 0.7 * second(others["down"][layer])
        assert_close(whole.take(layer), expected)
    assert count.forward == 2 // together * batches(session, parts)


def batches(session, parts):
    """Calls of the model in a pass."""
    return len(token_batches(session.tokenizer, [text for part in parts for text in part.texts]))


def test_no_whole_moments_beyond_four_passes(dense, monkeypatch):
    session = open_session(str(dense))
    monkeypatch.setattr("spp_export.calibration.whole.free_memory", lambda kind: 4 * 4 * 96**2)
    assert [passes(session, layers) for layers in (1, 4, 5)] == [1, 4, 0]
    monkeypatch.setattr("spp_export.calibration.whole.free_memory", lambda kind: 96**2)
    assert passes(session, 1) == 0


def test_a_mixture_weighs_collections_not_tokens(dense):
    source = open_source(dense)
    one, other = (
        gather(source, texts, ("attention", "mlp"), loader(dense)) for texts in (TEXTS, OTHERS)
    )
    mixed = Moments(((one, 0.3), (other, 0.7)))
    seen, others = direct(dense, TEXTS), direct(dense, OTHERS)

    def expected(of, place, layer):
        return 0.3 * of(seen[place][layer]) + 0.7 * of(others[place][layer])

    def mean(values):
        return values.mean(0)

    assert_close(mixed.blocks("attention", 1)[0], expected(second, "o", 1))
    assert_close(mixed.mean("attention", 0), expected(mean, "o", 0))
    assert_close(mixed.blocks("mlp", 0)[0], expected(second, "down", 0))
    assert_close(mixed.mean("mlp", 1), expected(mean, "down", 1))
    for found, place in (
        (mixed.sensitivity("attention"), "residual"),
        (mixed.sensitivity("mlp"), "stream"),
    ):
        wanted = [expected(inverse_square, place, layer) for layer in range(2)]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_record_of_a_layer_says_the_same(dense):
    source = open_source(dense)
    found = gather(source, TEXTS, KINDS, loader(dense))
    seen = direct(dense, TEXTS)
    axis = Axis(np.ones(64), np.ones(4))
    record = found.layer_statistics(source, 1, axis=axis, seed=3)
    assert (record.layer, record.heads, record.groups, record.seed) == (1, 4, 2, 3)
    assert record.axis is axis
    assert_close(record.attention.input_square, (seen["q"][1] ** 2).mean(0))
    assert_close(record.attention.mean, seen["o"][1].mean(0))
    assert_close(record.attention.square, (seen["o"][1] ** 2).mean(0))
    for head in range(4):
        part = seen["o"][1][:, head * 16 : (head + 1) * 16]
        assert_close(record.attention.second[head], second(part))
    assert_close(record.mlp.input_square, (seen["gate"][1] ** 2).mean(0))
    assert_close(record.mlp.mean, seen["down"][1].mean(0))
    assert_close(record.mlp.square, (seen["down"][1] ** 2).mean(0))
    sizes = {"query": 64, "key": 32, "value": 32, "output": 64, "head_gates": 4}
    for field in fields(Gradients):
        values = getattr(record.gradients, field.name)
        part = field.name if field.name in sizes else field.name.partition("_")[0]
        assert values.shape == (sizes.get(part, 96),)
        assert (values >= 0).all()
        assert values.max() > 0


def test_a_record_holds_what_was_asked_for(dense):
    source = open_source(dense)
    found = gather(source, TEXTS, ("attention", "mlp"), loader(dense))
    whole = found.layer_statistics(source, 0)
    assert whole.attention is not None
    assert whole.mlp is not None
    assert whole.gradients is None
    weights = layer_weights(source, 0)
    part = found.layer_statistics(source, 0, ["mlp"], weights=weights)
    assert part.weights is weights
    assert part.attention is None
    assert part.mlp is not None
    with pytest.raises(AssertionError, match="gradients statistics were not gathered"):
        found.gradients(0)


def test_weights_are_the_layers_own(dense):
    model = load_dense(dense)
    weights = layer_weights(open_source(dense), 1)
    for name, module in MODULES.items():
        expected = model.get_parameter(f"model.layers.1.{module}.weight")
        np.testing.assert_array_equal(getattr(weights, name), expected.detach().numpy())


@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [KINDS])
def test_the_second_time_costs_no_pass(dense, cache, kinds):
    source = open_source(dense)
    found = gather(source, TEXTS, kinds, loader(dense))
    assert set(found.parts) == set(kinds)
    assert gather(source, TEXTS, kinds, not_needed) == found
    files = {path for path in cache.rglob("*") if path.is_file()}
    assert files == set(found.parts.values())
    assert len(files) == len(kinds)


def test_kinds_gathered_apart_equal_those_gathered_together(dense, monkeypatch, tmp_path):
    source = open_source(dense)
    together = gather(source, TEXTS, KINDS, loader(dense))
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "another"))
    for kind in KINDS:
        apart = gather(source, TEXTS, [kind], loader(dense))
        assert apart.parts[kind] != together.parts[kind]
        assert apart.parts[kind].read_bytes() == together.parts[kind].read_bytes()


def test_passes_are_made_for_what_is_missing(dense):
    source, model = open_source(dense), Passes(dense)
    gather(source, TEXTS, ("attention", "mlp"), model)
    assert (model.forward, model.backward) == (1, 0)
    gather(source, TEXTS, ("attention", "mlp", "gradients"), model)
    assert (model.forward, model.backward) == (1, 1)
    gather(source, TEXTS, KINDS, model)
    assert (model.forward, model.backward) == (2, 2), "one for both kinds in units of the loss"
    gather(source, OTHERS, ["gradients"], model)
    assert (model.forward, model.backward) == (2, 3)
    gather(source, OTHERS, ["attention"], model)
    gather(source, OTHERS, ("attention", "mlp"), model)
    assert (model.forward, model.backward) == (4, 3)


def test_texts_that_bring_their_gradients_take_no_backward_pass(dense, tmp_path, monkeypatch):
    source, model = open_source(dense), Passes(dense)
    texts = [dialogue_text(range(3, 3 + count), 4) for count in (9, 6, 12)]
    kinds = ("attention loss", "mlp loss")
    computed = gather(source, texts, kinds, model)
    assert (model.forward, model.backward) == (1, 1)
    dialogues = [Dialogue("any", text.runs[0], 4) for text in texts]
    known = [
        dialogue_text(one.tokens, one.answer, one.gradients)
        for one in with_gradients(Dense(*loader(dense)(), source), dialogues)
    ]
    model.backward = 0
    brought = gather(source, known, kinds, model)
    assert model.backward == 0
    for kind in kinds:
        assert brought.parts[kind] != computed.parts[kind], "half precision"
        for layer in range(source.shape.num_layers):
            ours, theirs = (found.blocks(kind, layer) for found in (brought, computed))
            np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


def test_who_speaks_decides_moments_in_units_of_the_loss(dense):
    source, ids = open_source(dense), range(3, 15)
    found = [
        gather(source, [dialogue_text(ids, answer)], KINDS, loader(dense)).parts
        for answer in (3, 5)
    ]
    for kind in KINDS:
        differ = kind.endswith("loss")
        assert (found[0][kind] != found[1][kind]) == differ


def test_other_observers_look_on_in_the_same_pass(dense):
    source, model = open_source(dense), Passes(dense)
    first, again = (TextMeans("stream", len(TEXTS), 2, 64) for _ in range(2))
    found = gather(source, TEXTS, ["attention"], model, also=[first])
    assert model.forward == 1
    assert gather(source, TEXTS, ["attention"], not_needed) == found
    before = found.parts["attention"].stat().st_ino
    assert gather(source, TEXTS, ["attention"], model, also=[again]) == found
    assert model.forward == 2, "they have something to see although the cache has all"
    assert found.parts["attention"].stat().st_ino == before
    values = direct(dense, TEXTS)["stream"][1]
    np.testing.assert_allclose(first.values[0, 1], values[: len(TEXTS[0])].mean(0), rtol=1e-4)
    np.testing.assert_array_equal(first.values, again.values)


@pytest.mark.parametrize("texts", [TEXTS[::-1], TEXTS[:2], (*TEXTS, "more")])
def test_other_texts_are_another_entry(dense, texts):
    source = open_source(dense)
    found = gather(source, TEXTS, ["attention"], loader(dense))
    assert gather(source, texts, ["attention"], loader(dense)) != found


def test_another_precision_is_another_entry(dense):
    source = open_source(dense)
    found = gather(source, TEXTS, ["mlp"], loader(dense))
    assert gather(source, TEXTS, ["mlp"], loader(dense), dtype="bfloat16") != found
    assert gather(source, TEXTS, ["mlp"], not_needed, dtype="float32") == found


def test_another_model_of_the_same_sizes_is_another_entry(dense, tmp_path):
    """A fine-tuned model has the same config and the same tensors, by name, dtype and shape."""
    found = gather(open_source(dense), TEXTS, KINDS, loader(dense))
    tuned = make_checkpoint(tmp_path, "qwen2", kv_heads=2, query_heads=4, layers=2, seed=1)
    source = open_source(tuned)
    assert source.fingerprint == open_source(dense).fingerprint
    other = gather(source, TEXTS, KINDS, loader(tuned))
    assert not set(other.parts.values()) & set(found.parts.values())
    assert_close(other.blocks("attention", 0)[0], second(direct(tuned, TEXTS)["o"][0]))


def test_no_text_is_no_division_by_zero(dense):
    found = gather(open_source(dense), [""], KINDS, loader(dense))
    assert not found.blocks("attention", 0).any()
    assert not found.blocks("mlp", 1).any()
    assert not found.gradients(1).channel_gates.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "others"])
def test_a_damaged_entry_is_made_again(dense, kind, damage):
    source = open_source(dense)
    found = gather(source, TEXTS, KINDS, loader(dense))
    path = found.parts[kind]
    whole = path.read_bytes()
    if damage == "others":
        save_file({"sensitivity": np.zeros(2), "head_gates/0": np.zeros(4)}, path)
    else:
        path.write_bytes({"truncated": whole[:-9], "empty": b"", "text": b"no tensors"}[damage])
    model = Passes(dense)
    assert gather(source, TEXTS, KINDS, model) == found
    assert path.read_bytes() == whole
    assert (model.forward, model.backward) == {
        "gradients": (0, 1),
        "attention loss": (1, 1),
        "mlp loss": (1, 1),
    }.get(kind, (1, 0))


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("gradients",)])
def test_an_interrupted_pass_leaves_nothing(dense, cache, kinds):
    def dense_model():
        model, tokenizer = loader(dense)()

        def interrupt(*_):
            raise KeyboardInterrupt

        model.model.layers[1].register_forward_pre_hook(interrupt)
        return model, tokenizer

    with pytest.raises(KeyboardInterrupt):
        gather(open_source(dense), TEXTS, kinds, dense_model)
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_a_full_disk_leaves_nothing(dense, cache, monkeypatch):
    def no_space(file, begin, data):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spp_export.calibration.cache._write_at", no_space)
    with pytest.raises(OutputError, match="No space left"):
        gather(open_source(dense), TEXTS, ["attention"], loader(dense))
    assert not any(path.is_file() for path in cache.rglob("*"))


def files_of(collections):
    return [
        {kind: path.read_bytes() for kind, path in collection.parts.items()}
        for collection in collections
    ]


POOLS = (TEXTS, OTHERS, ("", "x"), ("Laws of a state bind its courts.", "Who may appeal?"))


def apart(source, model, monkeypatch, tmp_path):
    """Each pool by a pass of its own, and how often the model ran for that."""
    with monkeypatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path / "apart"))
        found = files_of([gather(source, texts, ("attention", "mlp"), model) for texts in POOLS])
    return found, model.forward


@pytest.mark.parametrize("room", [1 << 60, 0])
def test_pools_in_one_pass_are_the_pools_one_by_one(dense, monkeypatch, tmp_path, room):
    """Byte by byte, also where memory holds the sums of one pool at a time only."""
    source, model = open_source(dense), Passes(dense)
    expected, passes = apart(source, model, monkeypatch, tmp_path)
    tasks = []

    @contextmanager
    def listener(description, total):
        tasks.append((description, total))
        yield lambda done: None

    monkeypatch.setattr(moments, "free_memory", lambda device: room)
    with show_progress(listener):
        found = gather_all(source, POOLS, ("attention", "mlp"), model)
    assert files_of(found) == expected
    assert model.forward == 2 * passes
    assert len(tasks) == (1 if room else len(POOLS))
    assert gather_all(source, POOLS, ("attention", "mlp"), not_needed) == found


def test_a_pass_is_made_for_what_is_missing_alone(dense):
    source, model = open_source(dense), Passes(dense)
    gather(source, POOLS[1], ["attention"], model)
    seen = TextMeans("stream", len(POOLS[0]) + len(POOLS[1]), 2, 64)
    before = model.forward
    gather_all(source, POOLS[:2], ["attention"], model)
    assert model.forward == before + 1
    gather_all(source, POOLS[:2], ["attention"], model, also=[seen])
    wanted = direct(dense, OTHERS)["stream"][1].mean(0)
    np.testing.assert_allclose(seen.values[len(TEXTS), 1], wanted, rtol=1e-4, atol=1e-5)
