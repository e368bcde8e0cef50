"""`recover`: an export trained further, checked, taken up where it was interrupted."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from exporting import CASES, load, refused, stored, texts, tree, write_texts
from factories import read_config
from pairs import each, few
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app
from spp_export import RecoverSettings
from spp_export.calibration.activations import pad_rows
from spp_export.calibration.reading import dialogue_text
from spp_export.commands import layer_training
from spp_export.commands import recover as module
from spp_export.commands.training import Training, divergence
from spp_export.common.errors import CheckpointError, OutputError, QualityError, UsageError
from spp_export.common.manifest import check_manifest
from spp_export.models.checkpoint.checkpoint import open_source

pytestmark = pytest.mark.thinned(most=3)

NAMES = [case.name for case in CASES]
FEW = RecoverSettings(
    learn="text", watch_every=3, steps=6, rank=2, alpha=4, learning_rate=1e-2, batch_size=2
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
every_layout = pytest.mark.parametrize(
    ("case", "layout"),
    few(itertools.product(CASES, ("per-layer", "uniform", "ragged")), each),
    ids=str,
)


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "more.txt", texts("figures", 16, 40))


def recover(workshop, name, data, target, layout="per-layer", settings=FEW, **options):
    exported = workshop.exported(name, layout, options.pop("compensate", "none"))
    result = spp_export.recover(
        exported.path, data, target, model=str(exported.dense), **{**settings.to_dict(), **options}
    )
    return exported, result


@every_layout
def test_only_projections_change_and_the_result_verifies(workshop, data, tmp_path, case, layout):
    target = tmp_path / "recovered"
    exported, result = recover(workshop, case.name, data, target, layout)
    assert result.path == target
    assert result.after.slim_perplexity < result.before.slim_perplexity
    assert result.before.dense_perplexity == result.after.dense_perplexity
    before, after = exported.tensors, stored(target)
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert (tensor.shape, tensor.dtype) == (before[key].shape, before[key].dtype)
        trained = key.endswith(".weight") and key.split(".")[-2] in PROJECTIONS
        assert torch.equal(tensor, before[key]) != trained, key
    assert read_config(target) == read_config(exported.path)
    assert (target / "plan.json").read_bytes() == (exported.path / "plan.json").read_bytes()
    assert not check_manifest(target)
    assert spp_export.verify(target, model=str(exported.dense)).passed
    card = (target / "README.md").read_text()
    assert "## Recovered" in card
    assert "rank 2, alpha 4" in card
    record = json.loads((target / "recovery.json").read_text())
    assert record["data"]["name"] == "more.txt"
    assert record["loss"]["last"] < record["loss"]["first"]


def answering(**options):
    """Settings by which a tiny model learns from answers, as a whole."""
    known = {
        "layer_rounds": 0,
        "rank": 4,
        "alpha": 8,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "answer_tokens": 24,
    }
    return RecoverSettings(**{"steps": 40, "watch_every": 20, **known, **options})


@pytest.mark.parametrize("train", ["adapters", "weights"])
@pytest.mark.parametrize("name", few(NAMES, lambda name: {name.split("-")[0]}))
def test_it_learns_what_the_dense_model_answers(workshop, data, tmp_path, name, train):
    target = tmp_path / "recovered"
    wider = {"rank": 16, "alpha": 32, "learning_rate": 3e-3}
    settings = answering(train=train, **(wider if train == "adapters" else {}))
    exported, result = recover(workshop, name, data, target, settings=settings)
    assert result.after.mean_kl < 0.9 * result.before.mean_kl
    assert "answers to prompts that were not trained on" in result.after.source
    assert spp_export.verify(target, model=str(exported.dense)).passed
    record = json.loads((target / "recovery.json").read_text())
    assert record["settings"] == settings.to_dict()
    assert 0 < record["steps"]["best"] <= record["steps"]["taken"] == len(result.losses)
    before, after = exported.tensors, stored(target)
    layers, heads = exported.result.plan.layers, read_config(exported.dense)["num_attention_heads"]
    for key, tensor in after.items():
        trained = key.endswith(".weight") and key.split(".")[-2] in PROJECTIONS
        if trained and train == "weights":
            trained = len(layers[int(key.split(".")[2])].query_heads) < heads
        assert torch.equal(tensor, before[key]) != trained, key


LAYERS = answering(layer_rounds=8, steps=0)


@every_layout
def test_layers_learn_by_themselves(workshop, data, tmp_path, case, layout):
    """Without any step of the whole model, and so without adapters."""
    target = tmp_path / "recovered"
    exported, result = recover(workshop, case.name, data, target, layout, LAYERS)
    assert result.after.mean_kl < result.before.mean_kl
    assert result.losses == ()
    before, after = exported.tensors, stored(target)
    learnt = {layer.layer for layer in result.layers}
    assert learnt
    for key, tensor in after.items():
        assert (tensor.shape, tensor.dtype) == (before[key].shape, before[key].dtype)
        if not torch.equal(tensor, before[key]):
            assert key.split(".")[-2] in PROJECTIONS
            assert int(key.split(".")[2]) in learnt
    assert spp_export.verify(target, model=str(exported.dense)).passed
    record = json.loads((target / "recovery.json").read_text())
    assert record["layers"]["count"] == len(result.layers)
    assert record["layers"]["after"] < record["layers"]["before"]
    assert "loss" not in record
    card = (target / "README.md").read_text()
    assert f"The {len(learnt)} layers that were cut learnt, each by itself" in card
    assert "steps" not in card.partition("## Recovered")[2]


def test_layers_learn_before_the_whole_model_does(workshop, data, tmp_path):
    settings = answering(layer_rounds=2, steps=2, watch_every=0)
    _, result = recover(workshop, NAMES[0], data, tmp_path / "recovered", settings=settings)
    card = (tmp_path / "recovered" / "README.md").read_text().partition("## Recovered")[2]
    assert card.index("learnt, each by itself") < card.index("trained for 2 steps")
    assert result.to_dict()["layers"]["count"] == len(result.layers)
    record = json.loads((tmp_path / "recovered" / "recovery.json").read_text())
    assert record["before"]["mean_kl"] > record["between"]["mean_kl"] != result.after.mean_kl
    assert result.to_dict()["between"]["mean_kl"] == record["between"]["mean_kl"]


def test_layers_learn_on_the_pools_of_the_artifacts_too(workshop, data, tmp_path):
    exported = workshop.exported(NAMES[0])
    options = {"model": str(exported.dense), **LAYERS.to_dict()}
    alone, both = (
        spp_export.recover(exported.path, data, tmp_path / name, **options, artifacts=artifacts)
        for name, artifacts in (("alone", None), ("both", workshop.artifacts(NAMES[0])))
    )
    assert [x.layer for x in alone.layers] == [x.layer for x in both.layers]
    assert [x.before for x in alone.layers] != [x.before for x in both.layers]
    said = "and on the artifacts' texts"
    assert said not in (tmp_path / "alone" / "README.md").read_text()
    assert said in (tmp_path / "both" / "README.md").read_text()


def test_the_loss_is_the_distance_from_the_dense_models_distribution(workshop):
    """At a temperature, times its square; at every token, the prompt's too."""
    exported = workshop.exported(NAMES[0])
    dense, slim = load(exported.dense), load(exported.path)
    text = dialogue_text((5, 6, 7, 8, 9, 10, 11), 3)
    batch = pad_rows([(0, text), (1, dialogue_text((12, 13, 14), 1))])
    family = open_source(exported.dense).family
    settings = answering(temperature=2.0, learning_rate=1e-9)
    found = Training(slim, family, settings, [0], dense).step(batch)
    distances = []
    for ids in ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14)):
        p, q = (
            (model(torch.tensor([ids])).logits[0].detach() / 2).softmax(-1)
            for model in (dense, load(exported.path))
        )
        distances += [float((p[at] * (p[at] / q[at]).log()).sum()) for at in range(len(ids) - 1)]
    assert found == pytest.approx(4 * sum(distances) / len(distances), rel=1e-6)


def test_it_ends_where_it_gets_no_better_and_takes_the_best(workshop, data, tmp_path):
    """With a rate at which a few steps help and many do harm."""
    target = tmp_path / "recovered"
    settings = answering(steps=200, watch_every=2, learning_rate=5e-3)
    _, result = recover(workshop, NAMES[0], data, target, settings=settings)
    record = json.loads((target / "recovery.json").read_text())["steps"]
    assert record["taken"] == len(result.losses) < 200
    assert record["taken"] == record["best"] + 4 * 2
    assert result.after.mean_kl < result.before.mean_kl


def test_answers_of_a_model_on_disk_are_refused(workshop, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_session", partial(module.open_session, layerwise=True))
    with refused(UsageError, "--learn answers: every step asks the dense model"):
        recover(workshop, NAMES[0], data, tmp_path / "x", settings=answering())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_and_its_gradient_are_those_of_autograd(temperature):
    numbers = torch.Generator().manual_seed(0)
    logits, dense = 3 * torch.randn((2, 150, 40), generator=numbers)
    found, wanted = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = divergence(found, dense, temperature)
    log_q, log_p = ((row / temperature).log_softmax(-1) for row in (wanted, dense.double()))
    exact = temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / len(logits)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    (2 * value).backward()
    (2 * exact).backward()
    assert torch.allclose(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-8)
    assert divergence(dense, dense, temperature).item() == 0


@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_products_in_bfloat16_teach_the_same(workshop, data, tmp_path, train):
    found = {}
    for matmul in ("float32", "bfloat16"):
        options = {"settings": answering(train=train, steps=8), "matmul": matmul}
        exported, result = recover(workshop, NAMES[0], data, tmp_path / matmul, **options)
        assert json.loads((tmp_path / matmul / "recovery.json").read_text())["matmul"] == matmul
        assert spp_export.verify(tmp_path / matmul, model=str(exported.dense)).passed
        found[matmul] = result.losses
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


@pytest.mark.parametrize("compensate", ["lstsq", "bias"])
def test_compensated_exports_are_recovered_too(workshop, data, tmp_path, compensate):
    target = tmp_path / "recovered"
    exported, result = recover(workshop, NAMES[0], data, target, compensate=compensate)
    assert result.after.slim_perplexity < result.before.slim_perplexity
    assert spp_export.verify(target, model=str(exported.dense)).passed


def test_what_is_merged_is_the_base_and_a_low_rank_change(workshop, data, tmp_path):
    exported, _ = recover(workshop, NAMES[0], data, tmp_path / "recovered")
    before, after = exported.tensors, stored(tmp_path / "recovered")
    key = "model.layers.1.mlp.gate_proj.weight"
    change = (after[key].double() - before[key].double()).numpy()
    size = torch.linalg.svdvals(torch.from_numpy(change))
    assert size[1] > 1e-4
    assert size[2] < 1e-2 * size[1]


@pytest.mark.parametrize(
    "settings",
    [FEW, answering(steps=6, watch_every=2, train="weights")],
    ids=["text", "answers"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    workshop, data, tmp_path, monkeypatch, settings
):
    recovered = partial(recover, workshop, NAMES[0], data, settings=settings)
    _, whole = recovered(tmp_path / "whole" / "name")
    monkeypatch.setattr(module, "_KEPT_EVERY", 2)
    step, taken = Training.step, []

    def interrupted(self, batch):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, batch)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recovered(tmp_path / "again" / "name")
    assert not (tmp_path / "again" / "name").exists()
    monkeypatch.setattr(Training, "step", step)
    _, again = recovered(tmp_path / "again" / "name")
    assert (whole.resumed, again.resumed) == (0, 4)
    assert again.losses == whole.losses
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
    assert not list((module.cache_directory() / "recoveries").iterdir())


def test_layers_that_learnt_are_not_taught_again(workshop, data, tmp_path, monkeypatch):
    recovered = partial(recover, workshop, NAMES[0], data, settings=LAYERS)
    _, whole = recovered(tmp_path / "whole" / "name")
    learn, taught = layer_training._Lesson.learn, []

    def interrupted(self, *given):
        taught.append(self.index)
        if len(taught) == 2:
            raise KeyboardInterrupt
        return learn(self, *given)

    monkeypatch.setattr(layer_training._Lesson, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recovered(tmp_path / "again" / "name")
    _, again = recovered(tmp_path / "again" / "name")
    layers = [layer.layer for layer in whole.layers]
    assert taught == [layers[0], layers[1], *layers[1:]]
    assert again.layers == whole.layers
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
    assert not list((module.cache_directory() / "recoveries").iterdir())


def test_layers_of_a_model_on_disk_are_not_taught(workshop, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_session", partial(module.open_session, layerwise=True))
    with refused(UsageError, "--layer-rounds: the dense model's layers show"):
        settings = replace(FEW, layer_rounds=1)
        recover(workshop, NAMES[0], data, tmp_path / "x", settings=settings)


def test_a_model_that_got_worse_is_not_published(workshop, data, tmp_path):
    exported, _ = recover(workshop, NAMES[0], data, tmp_path / "good")
    other = write_texts(tmp_path / "other.txt", texts("capitals", 12, 3))
    target = tmp_path / "recovered"

    def forget(**options):
        options |= {"model": str(exported.dense), "validation": data, **FEW.to_dict()}
        return spp_export.recover(tmp_path / "good", other, target, **options)

    with refused(QualityError, "perplexity on text that was not trained on"):
        forget()
    assert not target.exists()
    with refused(QualityError, "Published all the same"):
        forget(keep_failed=True)
    assert spp_export.verify(target, model=str(exported.dense)).passed


def test_what_cannot_be_recovered_is_refused(workshop, data, tmp_path):
    name = NAMES[0]
    padded = workshop.exported(name, "padded")
    dense = str(padded.dense)
    for directory, error, match in (
        (padded.path, UsageError, "padded with zeros"),
        (padded.dense, OutputError, "no plan.json, so not an export of spp"),
    ):
        with refused(error, match):
            spp_export.recover(directory, data, tmp_path / "x", model=dense)
    short = write_texts(tmp_path / "short.txt", ["a"])
    with refused(UsageError, "no text of two tokens"):
        recover(workshop, name, short, tmp_path / "x", validation=data)
    for wrong in (
        {"steps": -1},
        {"layer_rounds": -1},
        {"rank": 0},
        {"learning_rate": 1.5},
        {"max_tokens": 1},
    ):
        with refused(UsageError, "expected"):
            recover(workshop, name, data, tmp_path / "x", settings=RecoverSettings(**wrong))
    with refused(UsageError, "--steps 0 without --layer-rounds trains nothing"):
        recover(workshop, name, data, tmp_path / "x", settings=answering(steps=0))
    assert not (tmp_path / "x").exists()


def test_a_damaged_export_is_refused(workshop, data, tmp_path):
    exported = workshop.exported(NAMES[0])
    copy = shutil.copytree(exported.path, tmp_path / "copy")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with refused(CheckpointError, r"config\.json"):
        spp_export.recover(copy, data, tmp_path / "x", model=str(exported.dense))


def test_the_command_says_what_it_did(workshop, data, tmp_path):
    exported = workshop.exported(NAMES[0])
    arguments = ["recover", str(exported.path), "--data", str(data), "--steps", "4", "--rank", "2"]
    arguments += ["--model", str(exported.dense), "-o", str(tmp_path / "r"), "--batch-size", "2"]
    arguments += ["--learn", "text", "--learning-rate", "0.01"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "4 steps" in found.stdout
    assert "perplexity" in found.stdout
    assert "next: spp chat" in found.stderr
    arguments = [arguments[0], *arguments[1:4], "--model", str(exported.dense)]
    arguments += ["-o", str(tmp_path / "l"), "--steps", "0", "--layer-rounds", "2"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "layers learnt" in found.stdout


def test_what_is_converted_from_it_says_that_the_dense_model_does_not_know_it(
    workshop, data, tmp_path
):
    exported, _ = recover(workshop, NAMES[0], data, tmp_path / "r")
    graph = tmp_path / "graph"
    found = spp_export.convert(str(tmp_path / "r"), graph, format="onnx")
    assert found.report["passed"]
    assert (graph / "recovery.json").is_file()
    with refused(UsageError, "was converted from an export that was trained further"):
        spp_export.verify(graph, model=str(exported.dense))
    (graph / "README.md").write_text("changed")
    assert not spp_export.verify(graph, model=str(exported.dense)).passed
