"""Statistics of families that compute otherwise than Llama, against explicit computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import load, make_dense, tokens

from spp_export.calibration.activations import StreamSensitivity, TokenBatch, observe
from spp_export.calibration.gradients import gradient_reductions
from spp_export.calibration.moments import BlockSums, layer_weights
from spp_export.common.errors import ModelError, PlanError
from spp_export.formats.settings import settings_of
from spp_export.importance import CRITERIA
from spp_export.importance.base import check_convention
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.models.families import FAMILIES
from spp_export.models.layerwise import open_layerwise
from spp_export.planning.planner import _check_family
from spp_export.planning.request import PlanRequest


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_source(make_dense(request.param, tmp_path / "dense"))


def batch() -> TokenBatch:
    ids = tokens()
    return TokenBatch(ids, torch.ones_like(ids), (0, 1))


@pytest.mark.parametrize("source", ["phi3"], indirect=True)
def test_stacked_projections_are_told_apart(source):
    """Weights, and sums of weight times gradient over the rows of each."""
    model = load(source.path)
    layer = model.model.layers[1]
    stacked = layer.self_attn.qkv_proj.weight, layer.mlp.gate_up_proj.weight
    parts = [*stacked[0].split([32, 16, 16]), *stacked[1].split([24, 24])]
    weights = layer_weights(source, 1)
    for name, part in zip(("query", "key", "value", "gate", "up"), parts, strict=True):
        assert np.array_equal(getattr(weights, name), part.detach().numpy())
    found = gradient_reductions(model, source.family, source.shape, [batch()])
    ids = tokens()
    logits = model(ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    losses.backward()
    rows = [(weight * weight.grad).abs().sum(1).detach() for weight in stacked]
    wanted = [*rows[0].split([32, 16, 16]), *rows[1].split([24, 24])]
    for name, part in zip(("query", "key", "value", "gate", "up"), wanted, strict=True):
        np.testing.assert_allclose(found[f"{name}_rows"][1], part.numpy(), rtol=1e-4)


@pytest.mark.parametrize("source", ["arcee"], indirect=True)
def test_a_gate_that_is_not_there_adds_nothing(source):
    assert not layer_weights(source, 0).gate.any()
    model = load(source.path)
    found = gradient_reductions(model, source.family, source.shape, [batch()])
    assert not found["gate_rows"][0].any()
    assert found["up_rows"][0].all()


SANDWICHES = {
    "gemma2": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "exaone4": ("post_attention_layernorm", "mlp"),
    "glm4": ("post_self_attn_layernorm", "post_attention_layernorm"),
}


@pytest.mark.parametrize("source", SANDWICHES, indirect=True)
def test_writes_through_a_norm_count_as_much_as_the_norm_lets_through(source):
    """At every token `(|n(o)| / |o|)^2 / |r|^2`, o what o_proj writes, n the norm, r the stream."""
    model, seen = load(source.path), {}
    norm, after = SANDWICHES[source.family.model_type]
    layer = model.model.layers[1]
    layer.get_submodule(norm).register_forward_hook(
        lambda _, args, out: seen.update(gain=(out.norm(dim=-1) / args[0].norm(dim=-1)))
    )
    layer.get_submodule(after).register_forward_pre_hook(
        lambda _, args: seen.update(stream=args[0].norm(dim=-1))
    )
    observer = StreamSensitivity(2, "residual_per_write")
    observe(model, source.family, [batch()], [observer])
    wanted = (seen["gain"] / seen["stream"]).square().sum().item()
    assert observer.sums[1].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("source", ["cohere"], indirect=True)
def test_what_parallel_blocks_write_is_read_after_both(source):
    model, seen = load(source.path), {}
    model.model.layers[0].register_forward_hook(
        lambda _module, _args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
    )
    observer = StreamSensitivity(2, "residual_per_write")
    observe(model, source.family, [batch()], [observer])
    wanted = (1 / seen["out"].norm(dim=-1).square()).sum().item()
    assert observer.sums[0].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("source", ["gemma2"], indirect=True)
def test_what_is_not_known_is_refused_by_name(source):
    with pytest.raises(ModelError, match=r"this format does not know .*, which gemma2 models have"):
        settings_of(source)
    with pytest.raises(ModelError, match="a model that runs from disk does not know capped"):
        open_layerwise(source.path, torch.float32)


def test_tensors_that_no_record_tells_of_are_refused_with_the_field():
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    config |= {"intermediate_size": 24, "vocab_size": 97, "qk_layernorm": True}
    with pytest.raises(ModelError, match="qk_layernorm is True; the record of the phi family has"):
        FAMILIES["phi"].read_shape(config, 4)


@pytest.mark.parametrize("source", ["gpt_neox", "gpt2", "falcon-40b", "mpt"], indirect=True)
def test_fused_projections_are_told_apart_however_they_are_stored(source):
    """Each head's queries, keys and values, as the stock attention tells them apart; sums of weight
    times gradient over the rows of each."""
    model, family = load(source.path), source.family
    module = model.get_submodule(family.layer_name(1, family.query))
    groups, dim = source.shape.kv_heads, source.shape.head_dim

    def parts(weight: torch.Tensor) -> list[torch.Tensor]:
        if family.transposed:
            weight = weight.T
        if not family.side_by_side:
            return list(weight.split([32, 32, 32]))
        heads = weight.unflatten(0, (groups, -1, dim))
        shares = heads.split([source.shape.group_size, 1, 1], dim=1)
        return [share.flatten(0, 2) for share in shares]

    weights = layer_weights(source, 1)
    for name, part in zip(("query", "key", "value"), parts(module.weight), strict=True):
        assert np.array_equal(getattr(weights, name), part.detach().numpy())
    found = gradient_reductions(model, family, source.shape, [batch()])
    logits = model(tokens()).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens()[:, 1:]).backward()
    products = parts((module.weight * module.weight.grad).abs().detach())
    for name, product in zip(("query", "key", "value"), products, strict=True):
        np.testing.assert_allclose(found[f"{name}_rows"][1], product.sum(1).numpy(), rtol=1e-4)


@pytest.mark.parametrize("source", ["opt", "opt-350m"], indirect=True)
def test_an_mlp_that_sees_no_rows_of_texts_is_read_as_others_are(source):
    """Gates of channels: at every text |sum over tokens of a . dL/da|, a what fc2 reads."""
    model, seen = load(source.path), []
    found = gradient_reductions(model, source.family, source.shape, [batch()])
    fc2 = model.model.decoder.layers[1].fc2
    fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]) or args[0].retain_grad())
    logits = model(tokens()).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens()[:, 1:])
    (losses * 2).backward()  # the sum of both texts' means
    products = (seen[0] * seen[0].grad).reshape(2, 11, -1)
    wanted = products.sum(1).abs().mean(0).detach()
    np.testing.assert_allclose(found["channel_gates"][1], wanted.numpy(), rtol=1e-4, atol=1e-9)


STREAMS = {"opt-350m": "self_attn_layer_norm", "opt": "final_layer_norm"}


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_written_before_a_norm_of_the_stream_counts_by_the_sum(name, tmp_path):
    source = open_source(make_dense(name, tmp_path / "dense"))
    model, seen = load(source.path), {}
    norm = model.model.decoder.layers[1].get_submodule(STREAMS[name])
    norm.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0].norm(dim=-1)))
    observer = StreamSensitivity(2, "residual_per_write")
    observe(model, source.family, [batch()], [observer])
    wanted = (1 / seen["stream"].square()).sum().item()
    assert observer.sums[1].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("source", ["qwen3_5_text"], indirect=True)
def test_tokens_are_counted_in_the_first_layer_that_attends(source):
    """Here the second: layers without heads show nothing, and no statistics are kept of them."""
    sums = BlockSums("attention", source.shape)
    observe(load(source.path), source.family, [batch()], sums.observers)
    seen = {}
    layer = load(source.path)
    module = layer.get_submodule(source.family.layer_name(1, source.family.output))
    module.register_forward_pre_hook(lambda _, args: seen.update(read=args[0].flatten(0, 1)))
    with torch.no_grad():
        layer(tokens())
    assert sums.averages(0) == {}
    wanted = seen["read"].mean(0).float().numpy()
    np.testing.assert_allclose(sums.averages(1)["mean/1"], wanted, rtol=1e-4, atol=1e-6)
    assert (sums.averages(2)["sensitivity"] > 0).all()


@pytest.mark.parametrize("source", ["deepseek_v3"], indirect=True)
def test_what_has_no_meaning_for_latents_is_refused_by_name(source):
    with pytest.raises(ModelError, match=r"criterion wanda does not know keys .* latents \(MLA\)"):
        check_convention(source.family, CRITERIA["wanda"])
    check_convention(source.family, CRITERIA["obs"])
    with pytest.raises(PlanError, match="deepseek_v3 caches latents for all heads together"):
        _check_family(source, PlanRequest(keep=0.5, cost="kv-bytes", units="heads"))
