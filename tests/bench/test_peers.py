"""The export beside its peers: what is asked, what is checked, and that failures are rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from factories import make_checkpoint, mask_in_torch, slice_in_torch, write_slim
from transformers import AutoModelForCausalLM

from spp_campaigns.peers import __main__ as command
from spp_campaigns.peers import check, in_memory, measure
from spp_campaigns.peers.candidates import (
    CANDIDATES,
    TORCH_PRUNING,
    Candidate,
    export_by_spp,
)
from spp_campaigns.peers.plans import PLANS, plans_for
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.planning import LayerPlan, Plan, validate_plan

INSTALLED = find_spec("torch_pruning") is not None
needs_torch_pruning = pytest.mark.skipif(not INSTALLED, reason="torch-pruning is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("dense")
    return open_source(make_checkpoint(root, "llama", kv_heads=3, query_heads=9, hidden=72))


@pytest.fixture(scope="module")
def plans(source: Checkpoint) -> dict[str, Plan]:
    return plans_for(source)


def written(plan: Plan, directory: Path) -> Path:
    path = directory / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    return path


def exported(export: Callable[..., None], source: Checkpoint, plan: Plan, out: Path) -> Path:
    out.mkdir()
    export(source.path, plan, out)
    return out


def checked(source: Checkpoint, plan: Plan, out: Path, tmp_path: Path) -> dict[str, Any]:
    """The answers of the oracle and of the check, run in this process."""
    plan_file, logits = written(plan, tmp_path), tmp_path / "logits.npy"
    reference = measure.reference(source.path, plan_file, logits, "float32")
    return reference | check.check(out, source.path, plan_file, logits, "float32")


def test_plans_fit_and_differ_as_their_names_say(source, plans):
    assert list(plans) == list(PLANS)
    for name, plan in plans.items():
        validate_plan(plan, source.shape, source.fingerprint)
        shapes = set(plan.layer_shapes(source.shape))
        assert (len(shapes) == 1) == name.startswith("uniform")
        assert all((layer.channels is None) == name.endswith("heads") for layer in plan.layers)
        assert all(shape.query_heads < source.shape.query_heads for shape in shapes)
    assert plans == plans_for(source)


@pytest.mark.parametrize("name", PLANS)
def test_ours_loads_and_is_the_masked_model(source, plans, name, tmp_path):
    out = tmp_path / "out"
    export_by_spp(source.path, plans[name], out)
    found = checked(source, plans[name], out, tmp_path)
    assert found["wrong_tensors"] == 0
    assert found["tensors"] == len(source.tensors)
    assert found["difference"] < 1e-4 < 0.1 < found["moved_by_plan"]
    assert ("code beside it" in found["loads"]) == name.startswith("per-layer")


def test_the_oracle_is_the_masked_model(source, plans, tmp_path):
    plan, logits = plans["per-layer, heads and channels"], tmp_path / "logits.npy"
    answer = measure.reference(source.path, written(plan, tmp_path), logits, "float64")
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64)
    with mask_in_torch(model, plan.layers):
        expected = check.logits(model)
    np.testing.assert_allclose(np.load(logits), expected, atol=1e-12)
    assert answer["largest_logit"] == pytest.approx(np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("uniform")])
def test_the_plain_script_keeps_what_was_asked(source, plans, name, tmp_path):
    out = exported(in_memory.export, source, plans[name], tmp_path / "out")
    found = checked(source, plans[name], out, tmp_path)
    assert found["loads"] == "from_pretrained"
    assert (found["wrong_tensors"], found["difference"] < 1e-4) == (0, True)


def test_layers_that_differ_do_not_load_from_a_stock_config(source, plans, tmp_path):
    plan = plans["per-layer, heads"]
    out = exported(in_memory.export, source, plan, tmp_path / "out")
    # transformers 4 does not say which shapes the config.json asks for.
    asked = r".*config\.json" if int(transformers.__version__.partition(".")[0]) > 4 else ""
    with pytest.raises(ValueError, match=rf"mismatched keys, such as model\.layers\.{asked}"):
        check.load(out, "auto")


def test_a_wrong_head_is_found_in_tensors_and_logits(source, plans, tmp_path):
    plan = plans["per-layer, heads"]
    first, *others = plan.layers
    group = set(range(source.shape.group_size))  # the query heads of KV head 0
    kept = group & set(first.query_heads)
    assert len(kept) == 2
    heads = (group - {min(kept)}) | (set(first.query_heads) - group)
    swapped = replace(first, query_heads=tuple(sorted(heads)))
    out = write_slim(tmp_path / "out", source.path, (swapped, *others))
    found = checked(source, plan, out, tmp_path)
    assert found["wrong_tensors"] == 2
    assert found["first_wrong"].startswith("model.layers.0.self_attn.o_proj.weight [72, ")
    assert found["difference"] > 1e-3 * found["largest_logit"]


@needs_torch_pruning
@pytest.mark.parametrize("name", PLANS)
def test_torch_pruning_keeps_what_was_asked_with_kv_heads_by_hand(source, plans, name, tmp_path):
    export = CANDIDATES["torch-pruning pickle"].prepare(source.path)
    out = exported(export, source, plans[name], tmp_path / "out")
    model, how = check.load(out, "auto")
    assert how == "torch.load"
    state = model.state_dict()
    dense = AutoModelForCausalLM.from_pretrained(source.path)
    for tensor, expected in slice_in_torch(dense, plans[name].layers).items():
        assert torch.equal(state[tensor], expected), tensor
    found = checked(source, plans[name], out, tmp_path)
    assert found["difference"] < 1e-4


@needs_torch_pruning
def test_torch_prunings_own_groups_are_whole_kv_groups(source, plans, tmp_path):
    eager = CANDIDATES["torch-pruning graph"].prepare(source.path)
    plan = plans["uniform, heads"]
    out = exported(eager, source, plan, tmp_path / "out")
    assert checked(source, plan, out, tmp_path)["wrong_tensors"] == 0
    with pytest.raises(ValueError, match=r"layer 0, .* removes every row of .*k_proj"):
        exported(eager, source, plans["per-layer, heads"], tmp_path / "other")


@needs_torch_pruning
def test_torch_prunings_graph_of_sdpa_takes_other_kv_heads(source, plans, tmp_path):
    export = CANDIDATES["torch-pruning graph sdpa"].prepare(source.path)
    layer = LayerPlan((0, 1), tuple(range(2 * source.shape.group_size)))
    plan = replace(plans["uniform, heads"], layers=(layer,) * source.shape.num_layers)
    out = exported(export, source, plan, tmp_path / "out")
    model, _ = check.load(out, "auto")
    found = check._tensors(model, source.path, json.loads(plan.to_json())["layers"])
    assert found["wrong_tensors"] == 2 * source.shape.num_layers
    assert found["first_wrong"] == "model.layers.0.self_attn.k_proj.weight [48, 72], asked [32, 72]"


def test_too_little_memory_skips_logits_with_a_reason(source, plans, monkeypatch, tmp_path):
    free = type("Memory", (), {"available": 10})
    monkeypatch.setattr(measure.psutil, "virtual_memory", lambda: free)
    steps: list[tuple[str, tuple[Any, ...]]] = []

    def run(step: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        steps.append((step.__name__, arguments))
        answers = {"export": {"seconds": 1.0}, "check": {"wrong_tensors": 0, "loads": "yes"}}
        return answers[step.__name__]

    monkeypatch.setattr(measure, "run_fresh", run)
    options = measure.Options([CANDIDATES["spp"]], ["uniform, heads"])
    found = measure.measure(source.path, "tiny", options, tmp_path)
    row = found["cases"][0]["rows"][0]
    assert row["skipped"] == "float32 needs about 1 GB, 0 GB are free"
    assert row["as_asked"]
    assert "equal" not in row
    assert [name for name, _ in steps] == ["export", "check"]
    assert steps[1][1][3] is None


@pytest.mark.slow
def test_the_command_writes_rows_and_removes_what_it_wrote(source, tmp_path, monkeypatch, capsys):
    absent = Candidate("absent", "is not there", lambda model: export_by_spp, "no-such-package")
    broken = Candidate("broken", "fails", lambda model: export_by_spp)  # unknown to the child
    for candidate in (absent, broken):
        monkeypatch.setitem(CANDIDATES, candidate.name, candidate)
    scratch, out = tmp_path / "scratch", tmp_path / "result.json"
    scratch.mkdir()
    arguments = ["--model", str(source.path), "--dir", str(scratch), "--json", str(out)]
    arguments += ["--plan", "per-layer, heads", "--precision", "float64"]
    arguments += [word for name in ("spp", "absent", "broken") for word in ("--only", name)]
    assert command.main(arguments) == 0
    document = json.loads(out.read_text())
    assert {"cpu", "cores", "torch", "transformers"} <= set(document["machine"])
    assert (TORCH_PRUNING in document["machine"]) == INSTALLED
    [case] = document["models"][0]["cases"]
    rows = {row["name"]: row for row in case["rows"]}
    assert rows["spp"]["equal"]
    assert rows["spp"]["difference"] < 1e-10 * case["reference"]["largest_logit"]
    assert 0 < rows["spp"]["seconds"] <= rows["spp"]["flushed_seconds"]
    assert rows["spp"]["peak_bytes"] > 0
    assert rows["spp"]["file_bytes"] > 0
    assert rows["absent"]["error"] == "no-such-package is not installed."
    assert rows["broken"]["error"] == "KeyError: 'broken'"
    assert not list(scratch.iterdir())
    printed = capsys.readouterr().out
    assert "as asked" in printed
    assert "broken: KeyError" in printed


def test_the_report_names_what_is_wrong():
    row = {"name": "peer", "seconds": 1, "flushed_seconds": 2, "peak_bytes": 3, "file_bytes": 4}
    wrong = {"loads": "torch.load", "as_asked": False, "wrong_tensors": 2, "tensors": 9}
    rows = [
        row | {"load_error": "ValueError: no"},
        row | wrong | {"first_wrong": "k_proj", "skipped": "no memory"},
    ]
    notes = list(command.notes({"rows": rows}))
    assert notes[0] == "peer: does not load: ValueError: no"
    assert notes[1] == "peer: 2 of 9 tensors are not what was asked for: k_proj"
    assert notes[2] == "peer: logits not compared: no memory"


@pytest.mark.slow
def test_results_are_loaded_without_this_project():
    script = "import sys, spp_campaigns.peers.check; sys.exit('spp_export' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_result_that_does_not_run_is_a_row(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source.path)
    reference = tmp_path / "logits.npy"
    np.save(reference, check.logits(model))
    assert check._difference(model, reference) == {"difference": 0}
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert check._difference(model, reference) == {"run_error": "logits are not finite"}
    output = model.model.layers[0].self_attn.o_proj
    output.weight = torch.nn.Parameter(output.weight[:, 1:])
    assert "Error: " in check._difference(model, reference)["run_error"]
