"""Random models of shapes, and a cache of fixed size: the same functions as the plain ones.

What needs a card is marked so; a stand-in for its graphs, which does the work again where they
would replay it, tests the rest anywhere.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spp_bench.bounds import Sizes
from spp_bench.engines.static import FixedLayer, Room, StaticRunner
from spp_bench.graphs import cuda_graph
from spp_bench.shapes.plans import Variant, shape_plan
from spp_bench.shapes.random_models import UNMASKED, random_dense, random_model, slim_of
from spp_bench.shapes.shapes import published
from spp_export.evaluation.oracle import masked_dense

TINY = published("tiny")
SMALL = {"layers": 3, "hidden": 64, "query_heads": 8, "kv_heads": 4}
SMALL |= {"head_dim": 16, "channels": 192, "vocabulary": 263}
VARIANTS = [
    Variant(keep, layout, units)
    for keep, layout, units in [
        (0.7, "per-layer", "both"),
        (0.5, "per-layer", "heads"),
        (0.6, "uniform", "both"),
    ]
]


def pair(variant, device="cpu", dtype=torch.float32, of=TINY):
    dense = random_dense(of, device, dtype)
    plan = shape_plan(of, variant)
    return dense, plan, slim_of(dense, of, plan.plan, plan.config)


def runner(model, plan=None, capture=None, room=None, name="x"):
    layers = plan.layers(TINY) if plan else TINY.shape.layers
    sizes = Sizes(TINY.shape, layers, (None,) * 3, 0, 4, False)
    room = room or Room(str(model.device), model.dtype)
    return StaticRunner(name, model, sizes, room, capture)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.shape.vocab_size, shape)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "qwen2.5-7b", "qwen3-8b"])
def test_a_slim_model_is_the_masked_dense_one(name, variant):
    of = replace(published(name), **SMALL)
    dense, plan, slim = pair(variant, of=of)
    text = torch.from_numpy(ids(2, 9))
    with torch.inference_mode():
        with masked_dense(dense, of.family, of.shape, plan.plan) as masked:
            wanted = masked(input_ids=text).logits
        found, whole = slim(input_ids=text).logits, dense(input_ids=text).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - whole).norm() > 0.1 * whole.norm()


def test_what_is_not_cut_is_shared():
    dense, _, slim = pair(Variant(0.7, "per-layer", "heads"))
    whole, part = dict(dense.named_parameters()), dict(slim.named_parameters())
    assert whole.keys() == part.keys()
    for name, tensor in whole.items():
        same = part[name].shape == tensor.shape
        assert (part[name].data_ptr() == tensor.data_ptr()) == same, name
    assert any(part[name].shape != tensor.shape for name, tensor in whole.items())


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-7b", "qwen3-8b", "mistral-7b-v0.3"])
def test_models_have_the_parameters_of_their_shapes(name):
    of = replace(published(name), **SMALL)
    plan = shape_plan(of, Variant(0.7, "per-layer", "both"))
    for config, layers in ((of.config, of.shape.layers), (plan.config, plan.layers(of))):
        model = random_model(of, config, layers, "cpu", torch.bfloat16)
        assert model.dtype == torch.bfloat16
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == of.shape.parameters(layers)


@pytest.mark.parametrize("variant", [None, *VARIANTS[:2]], ids=str)
def test_decoding_with_a_fixed_cache_gives_the_tokens_of_generate(variant):
    dense, plan, slim = pair(variant or VARIANTS[0])
    model, plan = (slim, plan) if variant else (dense, None)
    prompt, new = ids(2, 5), 6
    model.set_attn_implementation("sdpa")
    model.generation_config.pad_token_id = 0
    wanted = model.generate(
        torch.from_numpy(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    model.set_attn_implementation(UNMASKED)
    static = runner(model, plan)
    static.reserve(prompt.shape[1] + new)
    static.prefill(prompt)
    found = [static.logits().argmax(-1)]
    for _ in range(new - 1):
        static.decode(found[-1][:, None])
        found.append(static.logits().argmax(-1))
    assert np.stack(found, 1).tolist() == wanted[:, prompt.shape[1] :].tolist()


def test_a_graph_is_used_again_for_other_tokens_and_begins_where_it_did():
    dense, _, _ = pair(VARIANTS[0])
    captured = []

    def stand_in(work):
        captured.append(work)
        work()
        return work

    eager, graph = runner(dense), runner(dense, capture=stand_in)
    for seed in (1, 2):
        for one in (eager, graph):
            one.reserve(12)
            one.prefill(ids(2, 7, seed=seed))
            one.decode(ids(2, 4, seed=seed + 5))
            one.decode(ids(2, 1, seed=seed + 6))
        np.testing.assert_array_equal(eager.logits(), graph.logits())
    assert len(captured) == 2  # after 7 tokens, and after 11
    graph.forget()
    graph.reserve(12)
    graph.prefill(ids(2, 7))
    graph.decode(ids(2, 4))
    assert len(captured) == 3


def test_caches_share_their_room_and_come_out_right_in_turns():
    dense, plan, slim = pair(VARIANTS[0])
    room = Room("cpu", torch.float32)
    room.reserve(2 * 12 * 2 * 3 * 4 * 16)
    sharing = [runner(dense, room=room), runner(slim, plan, room=room)]
    alone = [runner(dense), runner(slim, plan)]
    for one in [*sharing, *alone]:
        one.reserve(12)
    for step in range(2):
        for one, other in zip(sharing, alone, strict=True):
            for each in (one, other):
                each.prefill(ids(2, 7, seed=step))
                each.decode(ids(2, 5, seed=step))
            np.testing.assert_array_equal(one.logits(), other.logits())
    places = {next(iter(one._buffers())).data_ptr() for one in sharing}
    assert len(places) == 1


def test_a_cache_can_begin_as_if_prompts_had_been_read():
    dense, _, _ = pair(VARIANTS[0])
    static = runner(dense)
    static.reserve(20)
    static.fill(3, 16)
    static.decode(ids(3, 4))
    assert np.isfinite(static.logits()).all()
    assert static.logits().shape == (3, TINY.shape.vocab_size)
    assert static.kv_bytes() == 3 * 20 * TINY.shape.kv_bytes_per_token(TINY.shape.layers, 4)


def test_a_layer_returns_what_is_written():
    layer = FixedLayer(torch.full((1, 1, 4, 1), 9.0), torch.full((1, 1, 4, 1), 9.0))
    for length, value in ((3, 1.0), (1, 2.0)):
        keys, _ = layer.update(*[torch.full((1, 1, length, 1), value)] * 2)
    assert keys.flatten().tolist() == [1, 1, 1, 2]
    assert (layer.get_seq_length(), layer.get_max_length()) == (4, 4)


def test_a_prompt_in_parts_is_refused():
    dense, _, _ = pair(VARIANTS[0])
    static = runner(dense)
    static.reserve(8)
    static.prefill(ids(1, 3))
    with pytest.raises(AssertionError, match="needs a mask"), torch.inference_mode():
        static._forward(torch.from_numpy(ids(1, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("variant", [None, *VARIANTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_decodes_as_its_kernels_do_one_by_one(variant, dtype):
    dense, plan, slim = pair(variant or VARIANTS[0], "cuda", dtype)
    model, plan = (slim, plan) if variant else (dense, None)
    eager, graph = runner(model, plan), runner(model, plan, cuda_graph)
    for seed in (1, 2):
        for one in (eager, graph):
            one.reserve(40)
            one.prefill(ids(2, 33, seed=seed))
            one.decode(ids(2, 7, seed=seed))
        exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05}
        np.testing.assert_allclose(graph.logits(), eager.logits(), **exact)
