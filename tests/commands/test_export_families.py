"""Families that compute otherwise than Llama, from the command line to the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import Workshop
from factories import VOCAB, make_checkpoint, write_tokenizer
from family_models import settings_of
from old_transformers import ABSENT, WRITES, but_in_old, since_5
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_models import make_talking

from spp_cli.main import run
from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import write_random
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source
from spp_export.planning import read_plan

# Without this package: what a reader of the card does.
_ALONE = """
import json, sys
import numpy
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

path, prompt = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype="float64")
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
picture = Image.fromarray(numpy.load(path + "/../picture.npy"))
inputs = processor(images=picture, text=prompt, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].double()
ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
print(json.dumps([type(model).__module__, "spp_export" in sys.modules, ids.tolist()]))
"""
PROMPT = "<image> What is this?"


def command(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


def test_norms_over_all_heads_go_through_every_command(workshop: Workshop, tmp_path: Path) -> None:
    """Verified against the norm over the kept heads, which plan, card and report say."""
    dense = make_checkpoint(tmp_path, "olmo2", kv_heads=2, query_heads=4, layers=2)
    model = ("--model", dense)
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    answers = ("--answer-tokens", "0")
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", "--units", "both", *answers)
    asked = (*asked, "--width-multiple", "8", "--layout", "ragged")
    command("export", "--scenario", workshop.scenario, *model, *asked, "-o", out)
    verdict = json.loads((out / "verify.json").read_text())
    assert verdict["passed"]
    (remark,) = json.loads((out / "plan.json").read_text())["family"]["remarks"]
    assert "norms all its heads" in remark
    assert f"{remark[:1].upper()}{remark[1:]}." in (out / "README.md").read_text()
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")
    assert "norms all its heads" in (tmp_path / "page.html").read_text()


@since_5(WRITES)
@pytest.mark.parametrize(
    ("family", "units", "layout", "keep"),
    [
        ("mixtral", "experts", "per-layer", 0.7),
        ("qwen3_moe", "all", "ragged", 0.45),
        pytest.param("qwen3_moe", "experts", "uniform", 0.7, marks=pytest.mark.slow),
    ],
)
def test_whole_experts_go_through_every_command(
    family: str, units: str, layout: str, keep: float, workshop: Workshop, tmp_path: Path
) -> None:
    """Another number of them in each layer, or in the uniform layout the same."""
    sizes = {"kv_heads": 2, "query_heads": 4, "layers": 3, "num_experts_per_tok": 2}
    sizes |= {"num_experts" if family == "qwen3_moe" else "num_local_experts": 6}
    dense = make_checkpoint(tmp_path, family, moe_intermediate_size=24, **sizes)
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    probed = ("--units", "heads", *answers, "-o", artifacts)
    command("probe", "--pools", workshop.pools, *model, *probed)
    asked = ("--artifacts", artifacts, "--keep", keep, "--units", units, "--layout", layout)
    command("export", "--scenario", workshop.scenario, *model, *asked, *answers, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = json.loads((out / "plan.json").read_text())
    counts = [len(layer.get("experts", range(6))) for layer in plan["layers"]]
    assert min(counts) >= 2
    assert sum(counts) < 18
    if units == "experts":
        assert (len(set(counts)) == 1) == (layout == "uniform")
    assert any(len(layer["query_heads"]) < 4 for layer in plan["layers"]) == (units == "all")
    (remark,) = plan["family"]["remarks"]
    assert remark.startswith(f"{sum(counts)} of 18 experts stay, ")
    assert f"{remark}." in (out / "README.md").read_text()
    realised = plan["budget"]["realised"]
    assert realised["cost"] <= realised["limit"]
    assert realised["expert_keep"] < 1
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert remark in page
    assert ("one number of experts for all layers" in page) == (layout == "per-layer")
    if layout != "ragged":
        graph = tmp_path / "graph"
        command("convert", out, "--format", "onnx", "--scenario", workshop.scenario, "-o", graph)
        command("verify", graph, *model)


@since_5(WRITES)
def test_every_group_of_experts_keeps_as_many(workshop: Workshop, tmp_path: Path) -> None:
    """A token is routed to one of two groups of four experts."""
    settings = settings_of("glm4_moe-groups", vocab=VOCAB, layers=4)
    settings.max_position_embeddings = 1024
    dense = write_random(settings, tmp_path / "dense", torch.float32)
    write_tokenizer(dense)
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    probed = ("--units", "heads", *answers, "-o", artifacts)
    command("probe", "--pools", workshop.pools, *model, *probed)
    asked = ("--artifacts", artifacts, "--keep", "0.7", "--units", "experts")
    command("export", "--scenario", workshop.scenario, *model, *asked, *answers, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = json.loads((out / "plan.json").read_text())
    kept = [layer["experts"] for layer in plan["layers"] if "experts" in layer]
    assert kept
    for experts in kept:
        assert 2 * sum(expert < 4 for expert in experts) == len(experts)


@since_5(WRITES)
@pytest.mark.parametrize(
    ("family", "units", "layout", "compensate"),
    [
        ("mixtral", "both", "per-layer", "lstsq"),
        ("qwen3_moe", "all", "per-layer", "none"),
        pytest.param("qwen3_moe", "channels", "uniform", "none", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "both", "ragged", "bias", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "both", "per-layer", "bias", marks=pytest.mark.slow),
    ],
)
def test_channels_of_experts_go_through_every_command(
    family: str,
    units: str,
    layout: str,
    compensate: str,
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every expert of a layer keeps as many, its own, and another number in each layer."""
    sizes = {"kv_heads": 2, "query_heads": 4, "layers": 3, "num_experts_per_tok": 2}
    sizes |= {"num_experts" if family == "qwen3_moe" else "num_local_experts": 4}
    dense = make_checkpoint(tmp_path, family, moe_intermediate_size=32, **sizes)
    width = open_source(dense).shape.expert_channels
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", "--units", units, "--layout", layout)
    asked = (*asked, "--width-multiple", "4", "--compensate", compensate)
    command("export", "--scenario", workshop.scenario, *model, *asked, *answers, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = json.loads((out / "plan.json").read_text())
    kept = [layer["expert_channels"] for layer in plan["layers"] if "expert_channels" in layer]
    assert kept
    assert all(len({len(row) for row in rows}) == 1 for rows in kept)
    assert any(len(rows) < 4 for rows in kept) == (units == "all")
    assert any(len(set(map(tuple, rows))) > 1 for rows in kept)
    widths = {len(rows[0]) for rows in kept}
    assert all(count % 4 == 0 and count < width for count in widths)
    assert len(widths) == 1 or layout != "uniform"
    *others, remark = plan["family"]["remarks"]
    assert len(others) == (units == "all")
    assert remark.startswith("every expert keeps ")
    assert "down projections of experts are not re-fitted" in remark
    card = (out / "README.md").read_text()
    assert f"{remark[:1].upper()}{remark[1:]}." in card
    assert "channels of experts" in card
    realised = plan["budget"]["realised"]
    assert realised["cost"] <= realised["limit"]
    assert realised["expert_keep" if units == "all" else "channel_keep"] < 1
    assert realised["parameters"] == sum(
        prod(tensor.shape) for tensor in open_checkpoint(out).tensors.values()
    )
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert remark[1:] in page
    assert "Channels of every expert kept, a bar per layer." in page
    assert f"of {width} channels of every expert" in page
    of_layers = "one number of experts" if units == "all" else "one width of experts"
    assert (f"{of_layers} for all layers" in page) == (layout == "per-layer")
    if layout != "ragged":
        graph = tmp_path / "graph"
        command("convert", out, "--format", "onnx", "--scenario", workshop.scenario, "-o", graph)
        command("verify", graph, *model)
    capsys.readouterr()
    planned = ("plan", "--scenario", workshop.scenario, *model, *asked, "--criterion", "taylor")
    assert run([str(word) for word in planned]) == 2
    assert "it says nothing of the channels of experts. Use energy, " in capsys.readouterr().err


@since_5(WRITES)
@pytest.mark.parametrize(
    ("family", "units", "compensate", "criterion"),
    [
        ("deepseek_v3", "channels", "lstsq", "obs"),
        ("glm4_moe", "all", "bias", "energy"),
        pytest.param("llama4_text", "both", "lstsq", "obs", marks=pytest.mark.slow),
        pytest.param("deepseek_v2", "both", "none", "wanda-sp", marks=pytest.mark.slow),
    ],
)
def test_channels_of_mlps_go_beside_those_of_experts(
    family: str,
    units: str,
    compensate: str,
    criterion: str,
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of layers without experts, in one budget with all else, and what they read is re-fitted."""
    settings = settings_of(family, vocab=VOCAB, layers=4)
    settings.max_position_embeddings, settings.num_hidden_layers = 1024, 4
    if family != "llama4_text":
        settings.first_k_dense_replace = 2
    dense = write_random(settings, tmp_path / "dense", torch.float32)
    write_tokenizer(dense)
    source = open_source(dense)
    shape = source.shape
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", "--units", units)
    asked = (*asked, "--width-multiple", "4", "--compensate", compensate)
    chosen = () if criterion == "obs" else ("--criterion", criterion)
    made = ("--scenario", workshop.scenario, *model, *asked, *answers, *chosen)
    command("export", *made, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = read_plan(out / "plan.json")
    assert plan.criterion["name"] == criterion
    cut = [i for i, layer in enumerate(plan.layers) if layer.channels is not None]
    assert cut
    assert not any(shape.sparse[index] for index in cut)
    assert any(layer.expert_channels for layer in plan.layers)
    realised = plan.budget["realised"]
    assert realised["cost"] <= realised["limit"]
    assert realised["mlp_keep"] < 1
    slim = open_checkpoint(out)
    assert realised["parameters"] == sum(prod(x.shape) for x in slim.tensors.values())
    index = cut[0]
    down = slim.weight(source.family.down, index)
    plain = source.weight(source.family.down, index)[:, list(plan.layers[index].channels or ())]
    assert (down != plain).any() == (compensate == "lstsq")
    biased = f"{source.family.layer_name(index, source.family.down)}.bias"
    assert (biased in slim.tensors) == (compensate == "bias")
    command("verify", out, *model)
    card = (out / "README.md").read_text()
    assert "| MLP channels |" in card
    command("report", out, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Percent of the channels of MLPs and experts kept, a bar per layer." in page
    kept = len(plan.layers[index].channels or ())
    assert f"Layer {index}\n{kept} of {shape.channels} channels, " in page
    capsys.readouterr()
    command("show", dense)
    assert "MLP channels" in capsys.readouterr().out
    again = tmp_path / "again"
    command("export", *made[:4], "--plan", out / "plan.json", "-o", again)
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_a_model_that_sees_answers_about_a_picture(workshop: Workshop, tmp_path: Path) -> None:
    """With its own processor, in transformers alone too, as the masked dense model does."""
    dense, artifacts, out = make_talking(tmp_path / "dense"), tmp_path / "artifacts", tmp_path / "o"
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", "--units", "both", *answers)
    asked = (*asked, "--width-multiple", "8", "--compensate", "none")
    command("export", "--scenario", workshop.scenario, *model, *asked, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    (remark,) = read_plan(out / "plan.json").remarks
    assert "text without pictures" in remark
    card = (out / "README.md").read_text()
    assert "AutoProcessor" in card
    assert "image-text-to-text" in card

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", pixels)
    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(out)
        slim = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float64)
        whole = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float64)
    inputs = processor(images=Image.fromarray(pixels), text=PROMPT, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    length = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    source = open_source(dense)
    plan = read_plan(out / "plan.json")
    with masked_dense(whole, source.family, source.shape, plan) as masked, torch.no_grad():
        expected, follows = masked(**inputs).logits, masked.generate(**inputs, **length).tolist()
        assert (slim(**inputs).logits - expected).abs().max().item() <= 1e-12
        assert slim.generate(**inputs, **length).tolist() == follows
    alone = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(out), PROMPT],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    module, ours, ids = json.loads(alone.stdout)
    assert module.startswith("transformers_modules")
    assert not ours
    assert ids == follows


@pytest.mark.parametrize(
    "family",
    but_in_old(
        ["qwen3_5_text", "deepseek_v3", "nemotron_h", "minimax", "gemma4_text"],
        {"qwen3_5_text", "nemotron_h", "gemma4_text"},
        ABSENT,
    ),
)
def test_what_is_beside_heads_stays_and_every_command_says_so(
    family: str, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of layers with softmax attention, or of MLA, go; gated delta nets and latents stay."""
    settings = settings_of(family)
    settings.vocab_size, settings.max_position_embeddings = VOCAB, 1024
    settings.vocab_size_per_layer_input = VOCAB
    dense = write_random(settings, tmp_path / "dense", torch.float32)
    write_tokenizer(dense)
    model = ("--model", dense)
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    units = ("--units", "heads" if family in ("deepseek_v3", "minimax") else "both")
    answers = ("--answer-tokens", "0", *units)
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", *answers)
    asked = (*asked, "--width-multiple", "8", "--layout", "ragged")
    command("export", "--scenario", workshop.scenario, *model, *asked, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]

    source, slim = open_source(dense), open_checkpoint(out)
    stay = {name for layer in source.shape.mixers for name, _ in layer}
    left = {name.split(".", 3)[-1] for name in slim.tensors}
    assert stay
    assert stay <= left
    plan = read_plan(out / "plan.json")
    assert plan.without_heads == source.shape.without_heads
    assert sum(layer.query_heads for layer in slim.layers) < sum(
        layer.query_heads for layer in source.layers
    )
    assert len(plan.remarks) == 1, plan.remarks
    (remark,) = plan.remarks
    assert remark == f"{source.family.mixers.name} stay as they are"
    assert f"{remark[:1].upper()}{remark[1:]}." in (out / "README.md").read_text()
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")
    assert remark[1:] in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    command("show", dense, "--json")
    facts = json.loads(capsys.readouterr().out)["facts"]
    parts = {part["part"]: part["parameters"] for part in facts["stays"]}
    assert parts[source.family.mixers.name] == sum(
        prod(size)
        for layer in source.shape.mixers
        for name, size in layer
        if name.rpartition(".")[0] in source.family.mixers.modules
    )
    (heads,) = (unit["layers"] for unit in facts["can_go"] if unit["unit"] == "query heads")
    assert heads == sum(source.shape.has_heads)
