"""Gradient reductions against torch.autograd on one unpadded text at a time.

The oracle multiplies gates of one into the inputs of o_proj and down_proj and differentiates the
loss that transformers computes with respect to the gates and the weights.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from factories import CASES, make_checkpoint, shape_of
from pairs import few
from transformers import AutoTokenizer

from spp_export.calibration.activations import observe, token_batches
from spp_export.calibration.cache import LOSS
from spp_export.calibration.gradients import gradient_lengths, gradient_reductions
from spp_export.calibration.moments import LossSums
from spp_export.calibration.reading import TokenText, dialogue_text
from spp_export.common.errors import UsageError
from spp_export.common.progress import show_progress
from spp_export.evaluation.quality import next_token_log_probabilities
from spp_export.models.families import FAMILIES
from spp_export.models.loader import load_dense

TEXTS = (
    "Benzene is aromatic.",
    "",
    "x",  # one token, hence no next one, hence no loss
    "Yes",
    "What do bonds yield when rates fall?",
    "A longer text than the others, so that every other row of its batch is mostly padding.",
)
WITH_A_LOSS = tuple(text for text in TEXTS if len(text) > 1)
# (module, summed axis) of each reduction over a weight
WEIGHTS = {
    "query_rows": ("self_attn.q_proj", 1),
    "key_rows": ("self_attn.k_proj", 1),
    "value_rows": ("self_attn.v_proj", 1),
    "output_columns": ("self_attn.o_proj", 0),
    "gate_rows": ("mlp.gate_proj", 1),
    "up_rows": ("mlp.up_proj", 1),
    "down_columns": ("mlp.down_proj", 0),
}


@contextmanager
def gated(model):
    """Gates of one, a leaf per layer [H] and [I], on what o_proj and down_proj read."""
    heads, channels, handles = [], [], []
    for layer in model.model.layers:
        for gates, module, count in (
            (heads, layer.self_attn.o_proj, model.config.num_attention_heads),
            (channels, layer.mlp.down_proj, model.config.intermediate_size),
        ):
            gate = torch.ones(count, dtype=model.dtype, requires_grad=True)
            gates.append(gate)
            size = module.in_features // count
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, gate=gate, size=size: (args[0] * gate.repeat_interleave(size),)
                )
            )
    yield heads, channels
    for handle in handles:
        handle.remove()


def one_by_one(model, tokenizer, texts):
    """Reductions {name: [per layer]} in the model's dtype, sums over texts in float64."""
    names = [
        (name, f"model.layers.{i}.{module}.weight", axis)
        for name, (module, axis) in WEIGHTS.items()
        for i in range(model.config.num_hidden_layers)
    ]
    weights = [model.get_parameter(path) for _, path, _ in names]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    gates = {"head_gates": 0.0, "channel_gates": 0.0}
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with gated(model) as (heads, channels):
            # The mask is all ones: without one, transformers 4.57 takes another way to attend.
            mask = torch.ones_like(ids)
            loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
            found = torch.autograd.grad(loss, [*weights, *heads, *channels])
        for total, gradient in zip(sums, found, strict=False):
            total += gradient
        rest = found[len(weights) :]
        gates["head_gates"] += torch.stack(rest[: len(heads)]).abs().double()
        gates["channel_gates"] += torch.stack(rest[len(heads) :]).abs().double()
    result = {name: list(total / len(texts)) for name, total in gates.items()}
    for (name, _, axis), weight, total in zip(names, weights, sums, strict=True):
        reduced = (weight.detach().double() * total / len(texts)).abs().sum(axis)
        result.setdefault(name, []).append(reduced)
    return result


def assert_same(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, layers in expected.items():
        for row, wanted in zip(found[name], layers, strict=True):
            assert row.dtype == np.float32
            assert float(wanted.max()) > 0
            atol = rtol * float(wanted.max())
            np.testing.assert_allclose(row, wanted.numpy(), rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def differentiated(request, tmp_path_factory):
    """A float64 model of each kind, what we run it with, and the oracle's reductions."""
    path = request.param.make(tmp_path_factory.mktemp("gradients"), layers=2)
    model, shape = load_dense(path, torch.float64), shape_of(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = one_by_one(model, tokenizer, WITH_A_LOSS)
    return model, tokenizer, FAMILIES[shape.model_type], shape, expected


@pytest.mark.parametrize("budget", [1, 4096])
def test_reductions_are_those_of_texts_one_by_one(differentiated, budget):
    model, tokenizer, family, shape, expected = differentiated
    batches = token_batches(tokenizer, TEXTS, batch_tokens=budget)
    assert len(batches) == (2 if budget > 1 else len(TEXTS) - 1)
    found = gradient_reductions(model, family, shape, batches)
    assert_same(found, expected, rtol=2e-5)


@pytest.fixture
def small(tmp_path):
    """A model whose parameters come in all states that have to be restored, and its parts."""
    path = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4, layers=2, tied=True)
    model, shape = load_dense(path), shape_of(path)
    return model, AutoTokenizer.from_pretrained(path), FAMILIES["llama"], shape


def state(model):
    """Requires-grad flags, gradients, and hooks now registered anywhere."""
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ]
    parameters = [(p.requires_grad, p.grad) for p in model.parameters()]
    after = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return parameters, hooks, after


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_found(small, error):
    model, tokenizer, family, shape = small
    second, *others = list(model.parameters())[1:]
    second.grad = torch.ones_like(second)
    second.requires_grad_(False)
    others[0].requires_grad_(False)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.grad = torch.ones_like(weight)
    parameters, hooks, _ = state(model)

    @contextmanager
    def progress(description, total):
        def advance_to(done):
            if error:
                raise error

        yield advance_to

    batches = token_batches(tokenizer, TEXTS, batch_tokens=60)
    if error:
        with pytest.raises(error), show_progress(progress):
            gradient_reductions(model, family, shape, batches)
    else:
        with show_progress(progress):
            gradient_reductions(model, family, shape, batches)
    after, hooks_after, on_parameters = state(model)
    assert [flag for flag, _ in after] == [flag for flag, _ in parameters]
    assert all(now is then for (_, now), (_, then) in zip(after, parameters, strict=True))
    assert hooks_after == hooks
    assert not any(on_parameters)
    assert (weight.grad == 1).all(), "a gradient of before took no part and was not touched"


def test_only_projections_take_gradients(small):
    model, tokenizer, family, shape = small
    seen = {}

    @contextmanager
    def progress(description, total):
        seen.update({name: p.requires_grad for name, p in model.named_parameters()})
        yield lambda done: seen.update(
            {f"{name} grad": p.grad is not None for name, p in model.named_parameters()}
        )

    with show_progress(progress):
        gradient_reductions(model, family, shape, token_batches(tokenizer, TEXTS))
    modules = {module for module, _ in WEIGHTS.values()}
    wanted = {f"model.layers.{i}.{module}.weight" for i in range(2) for module in modules}
    assert {name for name, value in seen.items() if value} == wanted


def test_gradients_are_summed_in_fp32_for_a_half_precision_model(small):
    model, tokenizer, family, shape = small
    model.to(torch.bfloat16)
    expected = one_by_one(model, tokenizer, WITH_A_LOSS)
    batches = token_batches(tokenizer, WITH_A_LOSS, batch_tokens=1)
    found = gradient_reductions(model, family, shape, batches)
    for name in WEIGHTS:
        for row, wanted in zip(found[name], expected[name], strict=True):
            # Each text's bf16 gradient is the same; sums in bf16 would be off by about 2^-9.
            error = np.linalg.norm(row - wanted.numpy()) / np.linalg.norm(wanted.numpy())
            assert error < 1e-5


def test_it_works_inside_no_grad(small):
    model, tokenizer, family, shape = small
    with torch.no_grad():
        batches = token_batches(tokenizer, TEXTS)
        found = gradient_reductions(model, family, shape, batches)
    assert found["query_rows"][0].max() > 0


def test_logits_are_made_of_predicting_tokens_only(small):
    model, tokenizer, family, shape = small
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    gradient_reductions(model, family, shape, token_batches(tokenizer, TEXTS))
    handle.remove()
    assert sum(count for count, _ in rows) == sum(len(text) - 1 for text in WITH_A_LOSS)
    assert {width for _, width in rows} == {shape.hidden_size}


@pytest.mark.parametrize("texts", [(), ("", "x")])
def test_without_a_next_token_all_is_zero(small, texts):
    model, tokenizer, family, shape = small
    found = gradient_reductions(model, family, shape, token_batches(tokenizer, texts))
    assert [len(rows) for rows in found.values()] == [2] * 9
    assert not any(row.any() for rows in found.values() for row in rows)


def test_an_offloaded_model_is_refused(small):
    model, tokenizer, family, shape = small
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UsageError, match="offloaded"):
        gradient_reductions(model, family, shape, token_batches(tokenizer, TEXTS))


def drawn_by(model, count, tokens):
    """Texts of tokens that the model draws, all but the first three of them its own to say."""
    with torch.no_grad():
        written = model.generate(
            torch.randint(3, 259, (count, 3), generator=torch.Generator().manual_seed(0)),
            do_sample=True,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            top_k=0,
        )
    return [dialogue_text(row, tokens) for row in written.tolist()]


def moments_by_loss(model, family, shape, batches):
    """By kind, the moments [1,m,m] of every layer."""
    lengths = gradient_lengths(model, family, shape, batches)
    parts = np.split(lengths, np.cumsum([batch.real_tokens for batch in batches])[:-1])
    batches = [replace(b, gradients=part) for b, part in zip(batches, parts, strict=True)]
    sums = {kind: LossSums(kind + LOSS, shape, batches) for kind in ("attention", "mlp")}
    observe(model, family, batches, [it for of_kind in sums.values() for it in of_kind.observers])
    layers = range(shape.num_layers)
    return {kind: [of.averages(i)[f"second/{i}"] for i in layers] for kind, of in sums.items()}


@pytest.mark.parametrize("case", few(CASES, lambda case: {case.family}), ids=str)
def test_moments_by_loss_are_those_of_every_token_alone(case, tmp_path):
    model, shape = load_dense(directory := case.make(tmp_path)), shape_of(directory)
    family = FAMILIES[case.family]
    texts = [*drawn_by(model, 2, 9), *drawn_by(model, 1, 5), TokenText(((7, 8, 9),))]
    batches = token_batches(None, texts, batch_tokens=40)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    found = moments_by_loss(model, family, shape, batches)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    sums = {kind: [0.0] * shape.num_layers for kind in found}
    predicted = 0
    model = model.double()
    for text in texts:
        seen = []

        def keep(key, seen, _, args, out):
            out.retain_grad()
            seen.append((key, args[0].detach(), out))

        handles = [
            model.get_submodule(family.layer_name(layer, role)).register_forward_hook(
                partial(keep, (kind, layer), seen)
            )
            for kind, role in (("attention", family.output), ("mlp", family.down))
            for layer in range(shape.num_layers)
        ]
        (ids,) = text.runs
        logits = model(torch.tensor([ids])).logits[0]
        places = [i for i in range(1, len(ids)) if text.answers is None or text.answers[0][i]]
        sum(-logits[i - 1].log_softmax(-1)[ids[i]] for i in places).backward()
        predicted += len(places)
        for (kind, layer), read, written in seen:
            for a, g in zip(read[0], written.grad[0], strict=True):
                sums[kind][layer] = sums[kind][layer] + (g @ g) * torch.outer(a, a)
        for handle in handles:
            handle.remove()
    for kind, of_layers in sums.items():
        for layer, total in enumerate(of_layers):
            expected = (total / (2 * shape.hidden_size * predicted)).numpy()
            (block,) = found[kind][layer]
            np.testing.assert_allclose(block, expected, atol=1e-5 * np.abs(expected).max())


def test_they_foretell_what_a_change_costs_in_nats(tmp_path):
    """Of a change in no direction, on text that the model has drawn."""
    directory = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)
    model, shape = load_dense(directory).double(), shape_of(directory)
    texts = drawn_by(model, 24, 40)
    batches = token_batches(None, texts)
    found = moments_by_loss(model, FAMILIES["llama"], shape, batches)
    generator = torch.Generator().manual_seed(1)
    for kind, name in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        weight = model.get_parameter(f"model.layers.1.{name}.weight")
        change = 0.03 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        change *= weight.detach().std()
        (block,) = found[kind][1]
        foretold = float((change.numpy() @ block * change.numpy()).sum())
        with torch.no_grad():
            plain = [next_token_log_probabilities(model, batch)[0] for batch in batches]
            weight += change
            changed = [next_token_log_probabilities(model, batch)[0] for batch in batches]
            weight -= change
        p, q = (torch.cat(rows).double() for rows in (plain, changed))
        cost = float((p.exp() * (p - q)).sum(1).mean())
        assert foretold == pytest.approx(cost, rel=0.25)
