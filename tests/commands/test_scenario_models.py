"""Slim models built in memory from a dense checkpoint and plans."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from exporting import CASES, refused, texts, write_texts

import spp_export
from spp_export.common.errors import PlanError, UsageError
from spp_export.domains.diagnosis import Diagnosis
from spp_export.planning import read_plan

pytestmark = pytest.mark.thinned(most=3)

NAMES = [case.name for case in CASES]
IDS = torch.tensor([[3, 9, 27, 11, 5, 8, 2, 30]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(workshop, name, layout="per-layer", compensate="none", **options):
    exported = workshop.exported(name, layout, compensate)
    made = spp_export.load(
        str(exported.dense),
        exported.path,
        artifacts=workshop.artifacts(name),
        scenario=workshop.scenario,
        **options,
    )
    return exported, made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["per-layer", "uniform", "ragged", "padded"])
def test_a_plan_gives_the_model_that_an_export_of_it_loads_as(workshop, name, layout):
    exported, made = load(workshop, name, layout)
    written = spp_export.load_slim(exported.path)
    assert type(made) is type(written)
    assert made.dtype == written.dtype
    assert not made.training
    found, wanted = made.state_dict(), written.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(logits(made), logits(written))
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(IDS, **asked), written.generate(IDS, **asked))


@pytest.mark.parametrize("compensate", ["lstsq", "bias"])
def test_compensation_is_the_exports(workshop, compensate):
    exported, made = load(workshop, NAMES[0], compensate=compensate)
    wanted = spp_export.load_slim(exported.path).state_dict()
    assert made.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in made.state_dict().items())


def test_generate_stops_where_a_chat_does(workshop, tmp_path):
    """At a token that only the tokenizer names, in memory and from an export."""
    exported = workshop.exported(NAMES[0], "per-layer", "none")
    dense = shutil.copytree(exported.dense, tmp_path / "dense")
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": 65}))
    out = tmp_path / "out"
    spp_export.export(output=out, model=str(dense), plan=exported.path / "plan.json", verify=False)
    made = spp_export.load(str(dense), exported.path)
    written = spp_export.load_slim(out)
    assert made.generation_config.eos_token_id == [65, 2]
    assert written.generation_config.eos_token_id == [65, 2]
    assert spp_export.open_chat(out).stop == {65, 2}


def test_models_share_what_their_plans_leave_and_only_that(workshop):
    name = NAMES[0]
    plans = {
        str(keep): workshop.plan(name, keep=keep, compensate="none").plan for keep in (0.5, 0.7)
    }
    dense = workshop.dense(name)
    models = spp_export.load_many(str(dense), plans)
    assert list(models) == ["0.5", "0.7"]
    shared, low, high = 0, models["0.5"], models["0.7"]
    for key, parameter in low.named_parameters():
        whole = models.dense.get_parameter(key).shape
        other = high.get_parameter(key)
        assert (parameter is other) == (parameter.shape == other.shape == whole), key
        shared += parameter.nbytes if parameter is other else 0
    assert 0 < shared < models.nbytes
    each = [sum(p.nbytes for p in model.parameters()) for model in models.values()]
    assert models.nbytes == sum(each) - shared
    whole = spp_export.load_dense(dense)
    assert torch.equal(logits(models.dense), logits(whole))
    assert models.dense.get_input_embeddings().weight is low.get_input_embeddings().weight


@pytest.mark.parametrize("unfamiliar", [False, True])
def test_the_model_of_the_closest_scenario_is_picked(unfamiliar, workshop, tmp_path, monkeypatch):
    name = NAMES[0]
    scenarios = {
        domain: write_texts(tmp_path / f"{domain}.txt", texts(domain, 8, 3))
        for domain in ("capitals", "figures", "small")
    }
    dense, artifacts = str(workshop.dense(name)), workshop.artifacts(name)
    monkeypatch.setattr(Diagnosis, "unfamiliar", unfamiliar)
    plans = [
        spp_export.plan(
            path,
            model=dense,
            artifacts=artifacts,
            keep=0.7,
            compensate="none",
        ).plan
        for path in scenarios.values()
    ]
    models = spp_export.load_many(dense, plans, artifacts=artifacts)
    assert list(models) == list(scenarios)
    for domain in scenarios:
        assert models.pick(texts(domain, 1, 99)[0]) == domain


def test_what_cannot_be_picked_or_named_is_refused(workshop):
    name = NAMES[0]
    exported = workshop.exported(name)
    dense = str(exported.dense)
    with refused(UsageError, "two plans are called 'sums'"):
        spp_export.load_many(dense, [exported.path, exported.path / "plan.json"])
    models = spp_export.load_many(dense, [exported.path])
    with refused(UsageError, "needs artifacts"):
        models.pick("a")
    plan = read_plan(exported.path / "plan.json")
    bare = type(plan)(
        plan.model_fingerprint, plan.model_source, plan.layout, plan.compensation, plan.layers
    )
    with refused(UsageError, "has no name"):
        spp_export.load_many(dense, [bare])
    models = spp_export.load_many(dense, {"bare": bare}, artifacts=workshop.artifacts(name))
    with refused(PlanError, "no diagnosis"):
        models.pick("a")
    other = next(case for case in NAMES if workshop.dense(case) != exported.dense)
    with refused(PlanError, "plan"):
        spp_export.load(str(workshop.dense(other)), bare)


def test_the_first_turn_of_a_chat_picks_who_answers(workshop, tmp_path):
    name = NAMES[0]
    dense, artifacts = str(workshop.dense(name)), workshop.artifacts(name)
    plans = []
    for domain in ("capitals", "figures"):
        scenario = write_texts(tmp_path / f"{domain}.txt", texts(domain, 8, 3))
        request = {"keep": 0.7, "compensate": "none"}
        made = spp_export.plan(scenario, model=dense, artifacts=artifacts, **request)
        plans.append(tmp_path / f"{domain}.json")
        plans[-1].write_text(made.plan.to_json())
    asked = {"max_new_tokens": 4}
    chat = spp_export.open_scenario_chat(plans, model=dense, artifacts=artifacts, raw=True)
    assert (chat.chosen, chat.raw, chat.model.runtime) == (None, True, "transformers")
    for domain, plan in zip(("figures", "capitals"), reversed(plans), strict=True):
        prompt = texts(domain, 1, 99)[0]
        answer = chat.ask(prompt, **asked)
        assert chat.chosen == domain
        own = spp_export.load(dense, plan, dtype="float32")
        runs = type(chat.model)(own)
        alone = spp_export.open_chat(dense, model=runs, raw=True)
        assert answer.token_ids == alone.ask(prompt, **asked).token_ids
        chat.ask(texts("small", 1, 5)[0], **asked)
        assert chat.chosen == domain
        chat.reset()
        assert chat.chosen is None
