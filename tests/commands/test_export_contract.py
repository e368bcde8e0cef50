"""What every export holds, whatever the family, the layout and the compensation."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exporting import (
    CASE,
    KEEP,
    Exported,
    Workshop,
    load,
    logits,
    masked,
    stored,
    tokens,
    written_heads,
)
from factories import CASES, read_config
from pairs import few, of_family
from transformers import AutoTokenizer, GenerationConfig

import spp_export
from spp_export.common.errors import PlanError

pytestmark = pytest.mark.thinned(most=4)

# Families whose stock config can give o_proj a bias.
BIASED = {"llama", "qwen3"}
# "padded" is layout ragged, written with --pad.
LAYOUTS = ("per-layer", "uniform", "ragged", "padded")
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
CODE = {"configuration_spp.py", "modeling_spp.py"}


@dataclass(frozen=True)
class Asked:
    """One export to be made."""

    case: str
    layout: str
    compensate: str


WRITTEN = [
    Asked(case.name, layout, compensate)
    for case in CASES
    for layout in LAYOUTS
    for compensate in ("none", "lstsq", "bias")
    if compensate != "bias" or layout != "uniform" or case.family in BIASED
]


def covered(asked: Asked) -> set[Hashable]:
    return of_family((CASE[asked.case], asked.layout, asked.compensate))


@pytest.fixture(
    scope="module",
    params=few(WRITTEN, covered),
    ids=lambda a: f"{a.case}-{a.layout}-{a.compensate}",
)
def asked(request: pytest.FixtureRequest) -> Asked:
    return request.param


@pytest.fixture(scope="module")
def out(workshop: Workshop, asked: Asked) -> Exported:
    return workshop.exported(asked.case, asked.layout, asked.compensate)


def test_every_check_holds(out):
    assert out.result.report["passed"] is True
    assert {check["passed"] for check in out.result.report["checks"]} == {True}
    assert json.loads((out.path / "verify.json").read_text()) == out.result.report


def test_logits_in_float64_are_those_of_the_masked_dense_model(out, asked):
    written = None if asked.compensate == "none" else out.unpadded
    slim = load(out.path)
    with masked(out.dense, out.result.plan.layers, written) as expected:
        difference = logits(slim, tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() == 0.0


def test_the_budget_is_kept(out, asked):
    """Counted in the files: what is left of q, k, v and o, without biases of o_proj, which no head
    owns, without those that compensation added, and without the zeros of padding."""

    def count(tensors, names):
        return sum(tensors[name].numel() for name in names)

    dense, slim = stored(out.dense), out.tensors
    owned = [name for name in dense if name.split(".")[-2] in ROLES]
    owned = [name for name in owned if not name.endswith("o_proj.bias")]
    kept, whole = count(slim, owned), count(dense, owned)
    padding = zeros(out) if asked.layout == "padded" else 0
    kept -= padding
    assert kept < whole
    assert kept <= KEEP * whole
    realised = out.result.plan.budget["realised"]
    assert (realised["cost"], realised["keep"]) == (kept, kept / whole)
    assert out.result.predicted.parameters == count(slim, slim)
    assert realised["parameters"] == count(slim, slim) - padding
    assert out.result.predicted.dense_parameters == count(dense, dense)


def zeros(out):
    """Elements of q_proj and o_proj that belong to no head of the source."""
    config, plan = read_config(out.dense), out.result.plan
    biased = "model.layers.0.self_attn.q_proj.bias" in out.tensors
    per_head = config["head_dim"] * (2 * config["hidden_size"] + biased)
    heads = [written_heads(plan, layer, out.group_size) for layer in plan.layers]
    return per_head * sum(layer.count(-1) for layer in heads)


def test_tensors_have_the_shapes_and_types_of_the_plan(out, asked):
    config, plan = read_config(out.dense), out.result.plan
    dense, slim = stored(out.dense), out.tensors
    for name, tensor in slim.items():
        assert tensor.dtype == dense.get(name, dense["model.embed_tokens.weight"]).dtype
        assert tensor.isfinite().all()
    for index, layer in enumerate(plan.layers):
        prefix = f"model.layers.{index}.self_attn"
        width = len(written_heads(plan, layer, out.group_size)) * config["head_dim"]
        assert slim[f"{prefix}.q_proj.weight"].shape[0] == width
        assert slim[f"{prefix}.o_proj.weight"].shape[1] == width
        for role in ("k_proj", "v_proj"):
            rows = slim[f"{prefix}.{role}.weight"].shape[0]
            assert rows == len(layer.kv_heads) * config["head_dim"]
        assert {head // out.group_size for head in layer.query_heads} == set(layer.kv_heads)
    sizes = {(len(layer.kv_heads), len(layer.query_heads)) for layer in plan.layers}
    assert asked.layout != "uniform" or len(sizes) == 1


def test_what_the_result_says_is_what_changed(out):
    """`tensors` lists every tensor whose shape differs, and the shapes before and after."""
    dense, slim = stored(out.dense), out.tensors
    changed = {
        name: (tuple(dense[name].shape), tuple(slim[name].shape))
        for name in dense.keys() & slim.keys()
        if dense[name].shape != slim[name].shape
    }
    listed = {entry["name"]: (entry["dense"], entry["slim"]) for entry in out.result.tensors}
    assert listed == changed


def test_every_file_is_there_and_in_the_manifest(out, asked):
    names = {path.name for path in out.path.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    expected |= {"tokenizer_config.json", "plan.json", "verify.json", "manifest.json", "README.md"}
    assert names == expected | (set() if asked.layout == "uniform" else CODE)
    listed = json.loads((out.path / "manifest.json").read_text())["files"]
    assert set(listed) == names - {"manifest.json"}
    for name, entry in listed.items():
        data = (out.path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_tokenizer_and_generation_settings_travel(out):
    text = "Sulfuric acid, H₂SO₄: naïve  café 🧪"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (out.path, out.dense))
    assert ours(text).input_ids == theirs(text).input_ids
    ours, theirs = (GenerationConfig.from_pretrained(path) for path in (out.path, out.dense))
    assert ours.to_dict() == theirs.to_dict()


def test_a_uniform_config_is_stock(out, asked):
    config = read_config(out.path)
    family = CASE[asked.case].family
    assert config["model_type"] == (family if asked.layout == "uniform" else f"spp_{family}")
    assert ("auto_map" in config) == (asked.layout != "uniform")


def test_the_card_says_what_the_export_is(out):
    card = (out.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Domains of the scenario: figures" in card
    assert "FAILED" not in card
    assert card.count(": passed.") == len(out.result.report["checks"])
    kept = sum(len(layer.query_heads) for layer in out.result.plan.layers)
    heads = read_config(out.dense)["num_attention_heads"] * len(out.result.plan.layers)
    assert f"| query heads | {heads} | {kept} |" in card
    counts = [
        sum(t.numel() for t in tensors.values()) for tensors in (stored(out.dense), out.tensors)
    ]
    assert f"| parameters | {counts[0]:,} | {counts[1]:,} |" in card


def test_nothing_names_a_path_of_this_machine(out, workshop):
    for path in out.path.iterdir():
        assert str(workshop.root).encode() not in path.read_bytes(), path.name


def test_verify_agrees(out, workshop):
    report = spp_export.verify(out.path, model=str(out.dense), scenario=workshop.scenario)
    assert report.passed, report.failures


ONE_OF_A_FAMILY = few(CASES, lambda case: {case.family})


@pytest.mark.parametrize("case", ONE_OF_A_FAMILY, ids=lambda case: case.name)
def test_layers_of_a_per_layer_plan_differ(workshop, case):
    """Else nothing above would be about per-layer."""
    layers = workshop.exported(case.name, "per-layer", "lstsq").result.plan.layers
    assert len({(len(layer.kv_heads), len(layer.query_heads)) for layer in layers}) > 1


def test_groups_of_ragged_plans_differ(workshop):
    """In a plan of every family at least: else nothing above would be about ragged."""
    uneven = set()
    for case, compensate in itertools.product(CASES, ("none", "lstsq")):
        if case.family in uneven:
            continue
        out = workshop.exported(case.name, "ragged", compensate)
        for layer in out.result.plan.layers:
            groups = [head // out.group_size for head in layer.query_heads]
            if len({groups.count(group) for group in layer.kv_heads}) > 1:
                uneven.add(case.family)
    assert uneven == {case.family for case in CASES}


@pytest.mark.parametrize("case", ONE_OF_A_FAMILY, ids=lambda case: case.name)
def test_quality_is_that_of_the_held_out_prompts(workshop, case):
    """Every fourth prompt, one at a time, by transformers' own loss."""
    out = workshop.exported(case.name, "per-layer", "lstsq")
    dense, slim = load(out.dense, torch.float32), load(out.path, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out.dense)
    prompts = workshop.scenario.read_text().strip().split("\n\n")
    nll, kl, same, count = torch.zeros(2, dtype=torch.float64), 0.0, 0, 0
    for prompt in (prompts[3], prompts[7]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        predicted = ids.shape[1] - 1
        with torch.no_grad():
            both = [model(ids, labels=ids) for model in (dense, slim)]
        nll += torch.tensor([float(output.loss) * predicted for output in both])
        p, q = (output.logits[0, :-1].double().log_softmax(-1) for output in both)
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += predicted
    found = out.result.report["quality"]
    dense_ppl, slim_ppl = (nll / count).exp().tolist()
    assert (found["texts"], found["tokens"]) == (2, count)
    assert found["dense_perplexity"] == pytest.approx(dense_ppl, rel=1e-3)
    assert found["slim_perplexity"] == pytest.approx(slim_ppl, rel=1e-3)
    assert found["ratio"] == pytest.approx(slim_ppl / dense_ppl, rel=1e-3)
    assert found["mean_kl"] == pytest.approx(kl / count, rel=1e-3)
    assert found["top1"] == pytest.approx(same / count, abs=1e-3)


@pytest.mark.parametrize(
    "name", [case.name for case in CASES if case.family not in BIASED], ids=lambda name: name
)
def test_a_stock_config_without_a_bias_on_o_proj_refuses_one(workshop, tmp_path, name):
    target = tmp_path / "made" / "slim"
    with pytest.raises(PlanError, match="has no bias on its output projection") as caught:
        workshop.export(name, target, layout="uniform", compensate="bias")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "compensate"),
    few(itertools.product(("bfloat16", "float16"), ("none", "lstsq", "bias")), set),
)
def test_the_stored_type_stays(workshop, tmp_path, dtype, compensate):
    dense = CASE["qwen3-gqa-tied"].make(tmp_path, dtype=dtype)
    spp_export.probe(workshop.pools, tmp_path / "artifacts", model=str(dense))
    result = spp_export.export(
        workshop.scenario,
        tmp_path / "slim",
        model=str(dense),
        artifacts=tmp_path / "artifacts",
        keep=KEEP,
        compensate=compensate,
        allow_empty_layers=False,
    )
    written = stored(tmp_path / "slim")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{dtype}"}
    assert read_config(tmp_path / "slim")["dtype"] == dtype
    slim = load(tmp_path / "slim")
    compensated = None if compensate == "none" else written
    with masked(dense, result.plan.layers, compensated) as expected:
        difference = logits(slim, tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() == 0.0


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(workshop, tmp_path, umask):
    before = os.umask(umask)
    try:
        workshop.export("llama-gqa-bias", tmp_path / "slim", compensate="lstsq")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "slim").stat().st_mode) == 0o777 & ~umask
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "slim").iterdir()}
    assert modes == {0o666 & ~umask}


def test_the_default_output_is_named_after_the_scenario(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = spp_export.export(
        workshop.scenario,
        model=str(workshop.dense("llama-mqa")),
        artifacts=workshop.artifacts("llama-mqa"),
    )
    assert result.path == Path("out") / "sums"
    assert result.path.is_dir()


def test_the_license_of_the_source_is_declared(workshop, tmp_path):
    dense = CASE["llama-mqa"].make(tmp_path)
    (dense / "README.md").write_text('---\nlicense: "apache-2.0"\ntags: [x]\n---\nText\n')
    (dense / "LICENSE").write_text("Terms\n")
    spp_export.export(
        workshop.scenario,
        tmp_path / "slim",
        model=str(dense),
        artifacts=workshop.artifacts("llama-mqa"),
        compensate="none",
    )
    card = (tmp_path / "slim" / "README.md").read_text()
    assert re.search(r"^license: apache-2.0$", card, re.MULTILINE)
    assert "# slim" in card
    assert (tmp_path / "slim" / "LICENSE").read_text() == "Terms\n"


def test_torch_is_left_as_it_was(workshop, tmp_path):
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    workshop.export("llama-mqa", tmp_path / "slim", compensate="none")
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
