"""The default model, cut for a scenario, as a user of `make demo` gets it.

The first run fetches the model, which stays in the user's cache. `make test` re-fits on every
twelfth text of the pools; that all of them give what they should is for `make test-all`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from factories import mask_in_torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from spp_export import ExportResult, export
from spp_export.calibration.answers import Answering, scenario_traffic
from spp_export.data.artifacts import bundled_artifacts, read_artifacts, write_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.hub import demo_model
from spp_export.models.session import open_session

pytestmark = pytest.mark.demo
SLOW = pytest.mark.slow

SCENARIO = Path(__file__).parents[2] / "benchmarks" / "data" / "scenarios" / "chemistry.txt"
QUESTION = "Why does salt dissolve in water?"


@dataclass(frozen=True)
class Demo:
    """The dense model, its tokenizer, and the export with its model."""

    dense: PreTrainedModel
    tokenizer: object
    result: ExportResult
    slim: PreTrainedModel


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """The real model is large enough to use them, as far as other workers leave them; the tiny ones
    of other tests are not."""
    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory):
    """The model's artifacts with a twelfth of the text of every domain, as their directory."""
    directory = tmp_path_factory.mktemp("demo") / "artifacts"
    artifacts = read_artifacts(bundled_artifacts())
    texts, dialogues = artifacts.calibration[::12], artifacts.dialogues[::12]
    thin = replace(artifacts, calibration=texts, dialogues=dialogues)
    assert {domain for domain, _ in thin.calibration} == set(artifacts.domains)
    directory.mkdir()
    write_artifacts(thin, directory)
    return directory


@pytest.fixture(scope="module", params=["few texts", pytest.param("all texts", marks=SLOW)])
def demo(request, few_texts, tmp_path_factory):
    target = tmp_path_factory.mktemp("demo") / "chemistry"
    few = {"artifacts": few_texts, "answer_tokens": 16}
    result = export(SCENARIO, target, keep=0.8, **(few if request.param == "few texts" else {}))
    dense = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    slim = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return Demo(dense, AutoTokenizer.from_pretrained(target), result, slim)


@pytest.fixture(scope="module")
def uniform(few_texts, tmp_path_factory):
    """Without what takes long: few texts, no re-fit, no checks."""
    target = tmp_path_factory.mktemp("demo") / "uniform"
    return export(
        SCENARIO,
        target,
        artifacts=few_texts,
        keep=0.8,
        layout="uniform",
        compensate="none",
        verify=False,
        answer_tokens=0,
    )


def token_ids(demo, text, limit=None):
    return torch.tensor([demo.tokenizer(text)["input_ids"][:limit]])


def put_in_place(demo):
    """The dense model with the re-fitted output projections at the columns of the kept heads."""
    stored = load_file(demo.result.path / "model.safetensors")
    size = demo.dense.config.head_dim
    before = {}
    for index, layer in enumerate(demo.result.plan.layers):
        name = f"model.layers.{index}.self_attn.o_proj.weight"
        weight = demo.dense.get_parameter(name)
        before[name] = weight.detach().clone()
        columns = [head * size + i for head in layer.query_heads for i in range(size)]
        with torch.no_grad():
            weight[:, columns] = stored[name]
    return before


def test_digits_are_split_first_and_the_terms_travel(demo):
    """As the model was trained, and as llama.cpp reads its file."""
    tokens = demo.tokenizer.tokenize
    assert tokens("x=30407,62") == ["x", "=", *"30407", ",", *"62"]
    assert tokens("7  81") == ["7", "ĠĠ", "8", "1"]
    assert tokens("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert "Apache License" in (demo.result.path / "LICENSE").read_text()
    assert "dequantised" in (demo.result.path / "NOTICE").read_text()
    card = (demo.result.path / "README.md").read_text()
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert "SmolLM2-135M-Instruct (dequantised from Q4\\_1)" in card
    assert demo.result.plan.model_source == "SmolLM2-135M-Instruct (dequantised from Q4_1)"


@torch.no_grad()
def test_logits_equal_the_masked_dense_models(demo):
    """What is kept of `o_proj` is compared as written; everything else is the dense model's. In
    float64, since this model amplifies rounding ten thousandfold at a token here and there."""
    prompts = read_scenario(SCENARIO).prompts[:4]
    before = put_in_place(demo)
    with mask_in_torch(demo.dense.double(), demo.result.plan.layers):
        expected = [demo.dense(token_ids(demo, text, 64)).logits for text in prompts]
    demo.dense.float()
    for name, weight in before.items():
        demo.dense.get_parameter(name).copy_(weight)
    found = [demo.slim.double()(token_ids(demo, text, 64)).logits for text in prompts]
    demo.slim.float()
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max().item() <= 1e-4
        assert torch.equal(a.argmax(-1), b.argmax(-1))


@torch.no_grad()
def perplexity(demo, model, texts):
    """exp of transformers' own loss, over the tokens of all answers."""
    total = tokens = 0
    for text in texts:
        ids = torch.tensor(text.runs)
        answers = torch.tensor([list(text.answers[0])]).bool()
        loss = model(ids, labels=torch.where(answers, ids, -100)).loss
        total += float(loss) * int(answers.sum())
        tokens += int(answers.sum())
    return math.exp(total / tokens)


def test_held_out_perplexity_is_close_to_dense(demo):
    answering = Answering(demo.result.plan.calibration["answer_tokens"])
    traffic = scenario_traffic(open_session(), read_scenario(SCENARIO), 1 << 15, answering)
    held_out = traffic.held_out.texts
    dense, slim = (perplexity(demo, model, held_out) for model in (demo.dense, demo.slim))
    assert dense < 60
    assert slim <= 1.3 * dense
    quality = demo.result.report["quality"]
    assert quality["dense_perplexity"] == pytest.approx(dense, rel=1e-3)
    assert quality["slim_perplexity"] == pytest.approx(slim, rel=1e-3)


def test_every_check_held_and_the_budget_is_kept(demo):
    report = json.loads((demo.result.path / "verify.json").read_text())
    assert report == demo.result.report
    assert report["passed"]
    assert len(report["checks"]) >= 4
    heads = {"dense": 0, "slim": 0}
    for which, model in (("dense", demo.dense), ("slim", demo.slim)):
        for layer in model.model.layers:
            projections = ("q_proj", "k_proj", "v_proj", "o_proj")
            heads[which] += sum(
                getattr(layer.self_attn, name).weight.numel() for name in projections
            )
    assert 0.78 < heads["slim"] / heads["dense"] <= 0.8
    sizes = {
        folder: (folder / "model.safetensors").stat().st_size
        for folder in (demo_model(), demo.result.path)
    }
    saved = sizes[demo_model()] - sizes[demo.result.path]
    assert saved == pytest.approx(4 * (heads["dense"] - heads["slim"]), rel=1e-3)


PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
question, per_layer, uniform = sys.argv[1:]
for path, trust in ((per_layer, True), (uniform, False)):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**chat, max_new_tokens=24, do_sample=False)
    print(json.dumps({
        "text": tokenizer.decode(ids[0, chat["input_ids"].shape[1]:], skip_special_tokens=True),
        "module": type(model).__module__,
        "ours": "spp_export" in sys.modules,
        "heads": [layer.self_attn.q_proj.out_features // 64 for layer in model.model.layers],
    }))
"""


@SLOW
def test_they_load_and_talk_in_a_process_that_knows_nothing_of_us(demo, uniform, tmp_path):
    """As in a user's own script: another directory, no network; uniform needs no code of ours."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "SPP_CACHE"}}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", PROCESS, QUESTION, str(demo.result.path), str(uniform.path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    for answer in answers:
        assert not answer["ours"]
        assert len(answer["text"].split()) > 5
    per_layer, stock = answers
    assert per_layer["module"].endswith("modeling_spp")
    assert per_layer["heads"] == [len(layer.query_heads) for layer in demo.result.plan.layers]
    assert len(set(per_layer["heads"])) > 1
    assert not list(uniform.path.glob("*.py"))
    assert stock["module"].startswith("transformers.models.llama")
    assert len(set(stock["heads"])) == 1
    assert stock["heads"][0] < 9
