"""Per-layer and ragged models against the masked dense model, which is what they must equal.

Where 0.0 is asked for, both models do the same operations on the same numbers, the masked one with
exact zeros among them. Float64 on CPU can then differ only where a matrix product sums in an order
that depends on its inner size or on the alignment of its operands. It does not at these sizes, with
several tokens at once and weights converted on loading, hence freshly allocated. Decoding token by
token takes other kernels, so it is compared by the tokens it gives.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from factories import (
    CASES,
    Case,
    mask_in_torch,
    ragged_layers,
    random_layers,
    read_config,
    shape_of,
    write_slim,
)
from old_transformers import since_5
from pairs import few, of_family
from transformers import AutoModel, AutoModelForCausalLM, Lfm2Config, PreTrainedModel

from spp_export.common.progress import quiet_transformers
from spp_export.models.loader import load_dense, load_slim
from spp_export.models.modeling import configuration_spp
from spp_export.planning import LayerPlan, Layout

pytestmark = pytest.mark.thinned(most=4)


@dataclass(frozen=True)
class Pair:
    """A dense checkpoint, what is kept of it, and the slim checkpoint."""

    dense: Path
    layers: Sequence[LayerPlan]
    slim: Path


SLOW = pytest.mark.slow
LAYOUTS = ("per-layer", "ragged")


def few_of(name: str, values: Iterable[object]) -> pytest.MarkDecorator:
    """Some of the cases, in some of the layouts, with some of these values: with every family and
    with every layout all of them."""
    return pytest.mark.parametrize(
        ("case", "layout", name),
        few(itertools.product(CASES, LAYOUTS, values), of_family),
        indirect=["case", "layout"],
        ids=str,
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def dense(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.make(tmp_path_factory.mktemp(case.name))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture(scope="module")
def pair(dense: Path, layout: Layout) -> Pair:
    return make_pair(dense, layout, seed=0)


def make_pair(dense: Path, layout: Layout, seed: int) -> Pair:
    """A random plan; every third keeps all channels."""
    make = ragged_layers if layout == "ragged" else random_layers
    layers = make(shape_of(dense), seed, channels=seed % 3 != 1)
    slim = dense.parent / f"{layout}{seed}"
    return Pair(dense, layers, slim if slim.exists() else write_slim(slim, dense, layers, layout))


@contextmanager
def masked(
    pair: Pair, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> Iterator[PreTrainedModel]:
    """The dense model with the removed units' inputs zeroed."""
    with mask_in_torch(
        load_dense(pair.dense, dtype, attn_implementation=attention), pair.layers
    ) as model:
        yield model


def tokens(batch: int = 2, length: int = 23) -> torch.Tensor:
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_the_masked_dense_model(dense, layout, attention, seed):
    pair = make_pair(dense, layout, seed)
    slim = load_slim(pair.slim, torch.float64, attn_implementation=attention)
    with masked(pair, attention=attention) as expected:
        difference = logits(slim, tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() == 0.0


def test_every_layer_has_the_planned_shape(pair):
    slim, shape = load_slim(pair.slim), shape_of(pair.dense)
    for layer, module in zip(pair.layers, slim.model.layers, strict=True):
        assert module.self_attn.q_proj.out_features == len(layer.query_heads) * shape.head_dim
        assert module.self_attn.k_proj.out_features == len(layer.kv_heads) * shape.head_dim
        assert module.mlp.up_proj.out_features == layer.shape(shape).channels
        assert type(module.self_attn).__module__.startswith("transformers.models.")


def test_the_config_says_which_query_heads_share_a_kv_head(pair, layout):
    shape, listed = shape_of(pair.dense), read_config(pair.slim)["per_layer_config"]
    for index, layer in enumerate(pair.layers):
        groups = [head // shape.group_size for head in layer.query_heads]
        wanted = [groups.count(group) for group in layer.kv_heads]
        assert listed[str(index)].get("query_groups") == (wanted if layout == "ragged" else None)
    if layout == "ragged" and shape.kv_heads > 1:
        assert len(set(listed["0"]["query_groups"])) == (2 if shape.group_size > 1 else 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_does_not_see_what_follows(pair, attention):
    slim = load_slim(pair.slim, torch.float64, attn_implementation=attention)
    other = torch.cat([tokens()[:, :11], tokens()[:, 11:].flip(1)], dim=1)
    assert not torch.equal(tokens(), other)
    difference = logits(slim, tokens())[:, :11] - logits(slim, other)[:, :11]
    assert difference.abs().max().item() == 0.0


def test_attention_can_be_switched_after_loading(pair):
    slim = load_slim(pair.slim, torch.float64, attn_implementation="sdpa")
    slim.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in slim.model.layers} == {"eager"}
    with masked(pair, attention="eager") as expected:
        difference = logits(slim, tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() == 0.0


GENERATIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 2},
    "uncached-beams": {"num_beams": 2, "use_cache": False},
}


@few_of("generation", GENERATIONS)
def test_generation_follows_the_masked_dense_model(pair, generation):
    options = GENERATIONS[generation]
    ids, attends = tokens(batch=2, length=14), torch.ones(2, 14, dtype=torch.long)
    ids[0, :5], attends[0, :5] = 0, 0  # left padding
    common = {"attention_mask": attends, "do_sample": False, "max_new_tokens": 8}
    common |= {"min_new_tokens": 8}
    beams = options.get("num_beams", 1)
    with masked(pair) as model:
        expected = model.generate(ids, use_cache=False, num_beams=beams, **common)
    slim = load_slim(pair.slim, torch.float64)
    assert slim.generate(ids, **common, **options).tolist() == expected.tolist()


@few_of("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_no_type_loses_more_than_the_masked_dense_model_does(pair, dtype):
    """err(slim) <= err(masked dense) + small, both against float64."""
    with masked(pair) as model:
        exact = logits(model, tokens())

    def error(model: PreTrainedModel) -> float:
        found = logits(model, tokens())
        assert found.dtype == dtype
        return ((found.double() - exact).norm() / exact.norm()).item()

    with masked(pair, dtype) as model:
        allowed = error(model) + torch.finfo(dtype).eps
    assert error(load_slim(pair.slim, dtype)) <= allowed


def test_saving_and_loading_again_changes_nothing(pair, tmp_path):
    slim = load_slim(pair.slim, torch.float64)
    with quiet_transformers():
        slim.save_pretrained(tmp_path)
    again = load_slim(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_spp.py",
        "modeling_spp.py",
    }
    assert again.config.to_dict()["per_layer_config"] == slim.config.to_dict()["per_layer_config"]
    assert again.config.auto_map == slim.config.auto_map
    before, after = slim.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Not 0.0: weights that need no conversion stay in the mapped file, where they are not aligned
    # as fresh memory is, and matrix products round by alignment.
    difference = logits(again, tokens()) - logits(slim, tokens())
    assert difference.abs().max().item() < 1e-12


def test_auto_model_gives_the_decoder(pair):
    slim = load_slim(pair.slim, torch.float64)
    base = AutoModel.from_pretrained(pair.slim, dtype=torch.float64)
    with torch.no_grad():
        hidden = base(tokens()).last_hidden_state
        assert torch.equal(hidden, slim.model(tokens()).last_hidden_state)


def test_tied_embeddings_stay_one_tensor(pair):
    slim = load_slim(pair.slim)
    shared = slim.lm_head.weight is slim.model.embed_tokens.weight
    assert shared == shape_of(pair.dense).tied_embeddings


def test_gradients_reach_every_parameter(pair):
    slim = load_slim(pair.slim, torch.float32)
    slim.train()
    slim(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert [name for name, value in slim.named_parameters() if value.grad is None] == []


def test_checkpointed_gradients_are_the_same(pair):
    found = []
    for checkpointed in (False, True):
        slim = load_slim(pair.slim, torch.float64)
        if checkpointed:
            old = slim.gradient_checkpointing_enable  # its name in transformers 4
            getattr(slim, "activation_checkpointing_enable", old)()
        slim.train()
        slim(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in slim.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_a_pickled_model_and_a_copy_are_the_same_model(pair, tmp_path):
    """Their layers follow their own config, not that of the model they were made from."""
    slim = load_slim(pair.slim, torch.float64)
    torch.save(slim, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(slim)):
        assert type(again) is type(slim)
        assert torch.equal(logits(again, tokens()), logits(slim, tokens()))
        again.set_attn_implementation("eager")
        layers = again.model.layers
        assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
    assert slim.model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_a_model_made_from_its_config_alone_has_initial_weights(pair):
    slim = load_slim(pair.slim)
    made = AutoModelForCausalLM.from_config(slim.config)
    assert type(made) is type(slim)
    for name, parameter in made.named_parameters():
        assert parameter.shape == slim.get_parameter(name).shape
        if parameter.dim() == 2:
            assert 0.015 < parameter[1:].std().item() < 0.025, name  # initializer_range


# peft asks transformers by a name that is going away.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_learns_on_all_projections_and_merges(pair):
    slim = load_slim(pair.slim, torch.float32)
    before = logits(slim, tokens())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(slim, peft.LoraConfig(r=2, target_modules=targets))
    adapted.train()
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(tokens(), labels=tokens(), use_cache=False).loss.backward()
        optimiser.step()
    adapted.eval()
    after = logits(adapted, tokens())
    assert not torch.equal(before, after)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens()), after, rtol=1e-3, atol=1e-3)


@since_5("it has no such check")
def test_layer_types_keep_the_names_that_the_stock_model_knows(monkeypatch):
    def rename(config):
        config.layer_types = ["linear_attention" for _ in config.layer_types]

    monkeypatch.setattr(Lfm2Config, "validate_layer_type", rename)
    config = configuration_spp.SppLfm2Config(num_hidden_layers=1, layer_types=["conv"])
    config.validate_layer_type()
    assert config.layer_types == ["conv"]
