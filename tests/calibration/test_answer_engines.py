"""Engines that answer prompts; vLLM as far as a process with its API in the place of its package
shows."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from factories import make_checkpoint

from spp_export.calibration import engines
from spp_export.calibration.answers import answer
from spp_export.calibration.engines import vllm as module
from spp_export.common.progress import show_progress
from spp_export.models.session import open_session

QUESTIONS = [(5, 6, 7), (8,), (9, 10)]
STOP = 2
# As much of vLLM as is used, of the same signatures; what it was given goes to a file.
PACKAGE = """
import json, os, sys
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, *, temperature, top_p, top_k, max_tokens, stop_token_ids, ignore_eos,
                 detokenize, seed):
        self.given = dict(locals())
        del self.given["self"]


class LLM:
    def __init__(self, model, *, skip_tokenizer_init, dtype, seed, max_model_len,
                 gpu_memory_utilization, enforce_eager, generation_config):
        self.given = dict(locals())
        del self.given["self"]

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        print("vLLM says this and that")
        with open(os.environ["FAKE_VLLM"], "w") as file:
            given = [params.given for params in sampling_params]
            cards = os.environ["CUDA_VISIBLE_DEVICES"]
            json.dump([self.given, prompts, given, cards], file)
        if len(prompts) == 1:
            raise RuntimeError("CUDA out of memory")
        outputs = []
        for _ in use_tqdm(prompts, desc="Rendering prompts"):
            pass
        bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True,
                       postfix="")
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            said = [ids[0], STOP, 77] if len(ids) == 2 else [ids[0]] * 9
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=said)]))
            bar.format_dict["elapsed"]
            bar.postfix = "fast"
            bar.update(1)
        bar.close()
        return outputs
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    place = make_checkpoint(root, "llama", kv_heads=1, query_heads=2, layers=2)
    settings = {"eos_token_id": STOP, "do_sample": True, "temperature": 0.5, "top_k": 7}
    (place / "generation_config.json").write_text(json.dumps(settings))
    return place


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """vLLM on a card; where it writes what it was given."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(f"STOP = {STOP}\n{PACKAGE}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_VLLM", str(tmp_path / "given.json"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 40 << 30))
    monkeypatch.setattr(module, "_LEAST_STEPS", 1)
    return tmp_path / "given.json"


def opened(checkpoint, device="cuda:1"):
    session = open_session(str(checkpoint))
    session.device = device
    return session


def test_vllm_is_asked_and_told(checkpoint, fake):
    """Of one card, with seeds of their own, the sampling of the generation config, and ends as
    they are here; progress comes back."""
    seen = []

    @contextmanager
    def listen(what, total):
        seen.append((what, total))
        yield seen.append

    session = opened(checkpoint)
    with show_progress(listen):
        texts = answer(session, QUESTIONS, 4, 11)
    assert [text.runs[0] for text in texts] == [
        (5, 6, 7, 5, 5, 5, 5),
        (8, 8, 8, 8, 8),
        (9, 10, 9, STOP),
    ]
    assert [sum(text.answers[0]) for text in texts] == [4, 4, 2]
    assert seen == [("answering prompts with vLLM", 3), 1, 2, 3]
    engine, prompts, sampling, cards = json.loads(fake.read_text())
    assert prompts == [{"prompt_token_ids": list(question)} for question in QUESTIONS]
    assert cards == "5"
    assert engine["model"] == str(session.source.path)
    assert (engine["dtype"], engine["max_model_len"]) == ("float32", 3 + 4)
    assert engine["gpu_memory_utilization"] == pytest.approx(0.6)
    first = sampling[0]
    assert (first["temperature"], first["top_p"], first["top_k"]) == (0.5, 1.0, 7)
    assert (first["max_tokens"], first["stop_token_ids"]) == (4, [STOP])
    assert len({each["seed"] for each in sampling}) == 3


def test_another_engine_has_other_answers_in_the_cache(checkpoint, fake, tmp_path):
    told = answer(opened(checkpoint), QUESTIONS, 4, 11)
    fake.unlink()
    assert answer(opened(checkpoint), QUESTIONS, 4, 11) == told
    assert not fake.exists()
    drawn = answer(opened(checkpoint, "cpu"), QUESTIONS, 4, 11)
    assert drawn != told
    assert len(list((tmp_path / "cache" / "answers").glob("*.safetensors"))) == 2


def test_where_vllm_fails_transformers_answers(checkpoint, fake, caplog):
    session = open_session(str(checkpoint))
    assert session.model  # on the CPU, for want of a card
    session.device = "cuda:1"
    told = answer(session, QUESTIONS[:1], 4, 11)
    assert "vLLM ended with status 1: RuntimeError: CUDA out of memory." in caplog.text
    assert told == answer(opened(checkpoint, "cpu"), QUESTIONS[:1], 4, 11)


def test_vllm_is_for_many_prompts_on_a_card(checkpoint, fake, monkeypatch):
    prompts = engines.Prompts([(1,)] * 640, 96, 0, {}, ())

    def names(**changes):
        session = opened(checkpoint)
        for name, value in changes.items():
            setattr(session, name, value)
        return [type(engine).__name__ for engine in engines.engines_at_hand(session, prompts)]

    both = ["Vllm", "Batches"]
    assert names() == names(device="cuda") == both
    assert names(device="cpu") == names(device="auto") == names(dtype="float64") == both[1:]
    monkeypatch.setattr(module, "_LEAST_STEPS", 20 * 96 + 1)
    assert names() == both[1:]
    monkeypatch.setattr(module, "_LEAST_STEPS", 20 * 96)
    assert names() == both
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert names() == both[1:]
