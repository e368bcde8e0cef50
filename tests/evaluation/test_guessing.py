"""Records that are guessed are those of the table, and what cannot be guessed says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import KNOWN, settings_of
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)

from spp_export import show
from spp_export.common.errors import ModelError, UsageError
from spp_export.evaluation.contract import LIMIT, write_random
from spp_export.evaluation.guessing.guess import Guess, guess, written
from spp_export.models.families import FAMILIES, Family, Feature, table
from spp_export.models.modeling import configuration_spp, modeling_spp

pytestmark = pytest.mark.thinned(most=5)

LAYERS_DIFFER = {Feature.EXPERTS, Feature.MIXERS, Feature.LATENT}
# Families whose layers are alike and whose MLPs are cut; two of these have one KV head for all
# query heads, whatever their config's number of them.
DENSE = {
    name
    for name in KNOWN
    if FAMILIES[name].down and FAMILIES[name].features.isdisjoint(LAYERS_DIFFER)
} - {"falcon", "gpt_bigcode"}
if transformers.__version__.startswith("4."):
    # What version 4 does not make without memory, does not compute in float64, or reads no rotary
    # settings of in their present form.
    DENSE -= {"apertus", "mpt", "gpt_neox", "olmo3", "gemma3_text"}
COMPARED = (
    *("architecture", "features", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "head_norms"),
    *("qk_norm_bias", "heads_divide_hidden", "derived_head_dim", "side_by_side", "transposed"),
    *("uneven_groups", "caches_queries", "layers", "query", "key", "value", "output", "gate"),
    *("up", "down", "attention", "attention_norm", "mlp_norm", "more_norms", "norm_weight"),
    *("norm_bias", "wide_norms", "head_rows", "fixed", "per_head", "embedding", "positions"),
    *("more_positions", "final_norm", "head", "head_bias", "sliding", "end_token"),
    *("config_class", "decoder_class"),
)
# What a proposal leaves to config.json as it is, and the table does not; attention that clips what
# it projects, and whose window has a key of its own.
OTHERWISE: dict[str, set[str]] = {
    "opt": {"norm_weight"},
    "stablelm": {"more_norms"},
    "gpt_neo": {"features"},
    "olmo": {"features"},
    "cohere2": {"derived_head_dim"},
}


def guessed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Guess:
    """For the tiny config of a family that is no longer in the table."""
    config = {**settings_of(name).to_dict(), "model_type": name}
    monkeypatch.delitem(FAMILIES, name)
    return guess(config, folder)


@pytest.fixture(autouse=True)
def _the_order_of_families() -> Iterator[None]:
    """What a test takes out and gives back would else come last in the tables that are made."""
    whole = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(whole)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_a_record_that_is_gone_is_guessed_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = FAMILIES[name].of(settings_of(name).to_dict())
    found = guessed(name, tmp_path, monkeypatch)
    assert found.proven.keys() >= {"per-layer", "ragged"}
    assert max(found.proven.values()) <= LIMIT
    assert name not in FAMILIES  # what was proven stands in no table yet
    again = eval(written(found.family).removesuffix(","), dict(vars(table)))
    assert again == found.family
    otherwise = OTHERWISE.get(name, set())
    if transformers.__version__.startswith("4."):
        otherwise = otherwise | {"heads_divide_hidden"}  # configs of which refuse no count
    names = [field for field in COMPARED if field not in otherwise]
    assert {field: getattr(again, field) for field in names} == {
        field: getattr(known, field) for field in names
    }


class ParrotConfig(LlamaConfig):
    """Of an architecture of somebody's own."""

    model_type = "parrot"

    def __init__(self, wide_bias: bool = False, **kwargs: Any) -> None:
        self.wide_bias = wide_bias
        super().__init__(**kwargs)


class ParrotMlp(nn.Module):
    """Without a gate, and with a factor."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wide = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.wide_bias)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.wide_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.narrow(torch.relu(self.wide(x)))


class ParrotDecoderLayer(LlamaDecoderLayer):
    """Llama's, with another MLP."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = ParrotMlp(config)


class ParrotModel(LlamaModel):
    """Llama's, with other layers."""

    config_class = ParrotConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = [ParrotDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)


class ParrotForCausalLM(LlamaForCausalLM):
    """Llama's, with another decoder."""

    config_class = ParrotConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = ParrotModel(config)


def test_an_architecture_of_somebodys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed as part of transformers, as per-layer classes are made of what is there."""
    for kind in (ParrotConfig, ParrotModel, ParrotForCausalLM):
        # The package takes another's place in sys.modules while some of its own are imported.
        for package in (configuration_spp.transformers, modeling_spp.transformers):
            monkeypatch.setattr(package, kind.__name__, kind, raising=False)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "parrot", ParrotConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, ParrotConfig, ParrotForCausalLM)
    found = guess(ParrotConfig().to_dict(), tmp_path)
    assert found.family == Family(
        "parrot",
        "ParrotForCausalLM",
        frozenset({Feature.MULTIPLIERS, Feature.NO_GATE}),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="wide_bias",
        heads_divide_hidden=found.family.heads_divide_hidden,
        gate="",
        up="mlp.wide",
        down="mlp.narrow",
        end_token=2,
    )
    assert len(written(found.family).splitlines()) <= 5
    assert max(found.proven.values()) <= LIMIT


UNKNOWN = {
    "mixtral": "it has experts, as in ",
    "codegen": "layout per-layer: ",
    "diffllama": r"records have no field for self_attn.lambda_q1, of shape \[24\] here",
    "bert": "not run. Install a version that has it",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_record_describes_is_said_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, name, raising=False)
    config = {**AutoConfig.for_model(name).to_dict(), "model_type": name}
    if name == "bert":
        config["model_type"] = "remote"
    with pytest.raises(ModelError, match=UNKNOWN[name]) as error:
        guess(config, tmp_path)
    assert str(error.value).startswith("no record can be guessed for")
    assert "\n" not in str(error.value)


def test_show_guesses_and_tells_of_the_model_by_the_guess(tmp_path: Path) -> None:
    settings = AutoConfig.for_model(
        "hunyuan_v1_dense",
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=24,
        vocab_size=97,
        pad_token_id=0,
    )
    write_random(settings, tmp_path / "model")
    found = show(tmp_path / "model", guess=True)
    assert found.kind == "guessed record"
    assert found.facts["record"][0].startswith('Family("hunyuan_v1_dense",')
    assert found.facts["proven"].keys() == {"per-layer", "ragged", "uniform"}
    assert [row["unit"] for row in found.facts["can_go"]] == [
        "query heads",
        "KV groups",
        "MLP channels",
    ]
    with pytest.raises(ModelError, match="model_type 'hunyuan_v1_dense' is not supported"):
        show(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match=r"llama models have a record\. Drop --guess"):
        show(tmp_path / "model", guess=True)
