"""What `export` writes loads where this package does not exist: another process, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from exporting import logits, masked
from transformers import AutoTokenizer

PROMPT = "12 + 30 = 42"
CASES = (
    ("llama-gqa-bias", "per-layer", "lstsq"),
    ("llama-mha-tied", "per-layer", "bias"),
    ("mistral-window-tied", "per-layer", "none"),
    ("qwen2-gqa-tied", "per-layer", "lstsq"),
    ("qwen3-mqa-bias", "per-layer", "bias"),
    ("llama-mqa", "uniform", "bias"),
    ("mistral-gqa", "uniform", "lstsq"),
    ("qwen2-mha-window", "uniform", "none"),
    ("qwen3-gqa-tied", "uniform", "lstsq"),
)
# -I leaves out PYTHONPATH and the working directory; what is installed is refused by name.
LOAD = """
import json, socket, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spp_export":
            raise ImportError("the checkpoint asked for spp_export")

def no_network(*_):
    raise OSError("the checkpoint asked for the network")

sys.meta_path.insert(0, Refuse())
socket.socket.connect = no_network
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out, prompt, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for index, (path, remote) in enumerate(jobs):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, trust_remote_code=remote
    )
    # A tokenizer is found by way of the config's class.
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote)
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        numpy.save(f"{out}/{index}.npy", model(**batch).logits.numpy())
        ids = model.generate(**batch, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    print(json.dumps([type(model).__name__, ids.tolist()]))
"""


@pytest.fixture(scope="module")
def loaded(workshop, tmp_path_factory):
    """Class, greedy continuation and logits of each export, by one fresh interpreter."""
    out = tmp_path_factory.mktemp("elsewhere")
    jobs = []
    for name, layout, compensate in CASES:
        path = workshop.exported(name, layout, compensate).path
        jobs.append((str(path), layout == "per-layer"))
    result = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(out), PROMPT, json.dumps(jobs)],
        cwd=out,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {
        case: (*line, torch.from_numpy(np.load(out / f"{index}.npy")))
        for index, (case, line) in enumerate(zip(CASES, lines, strict=True))
    }


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_loads_and_computes_what_it_should(workshop, loaded, case):
    """Per-layer with its own code allowed, uniform without any."""
    name, layout, compensate = case
    out = workshop.exported(name, layout, compensate)
    kind, ids, found = loaded[case]
    assert kind.startswith("Spp") == (layout == "per-layer")
    batch = AutoTokenizer.from_pretrained(out.dense)(PROMPT, return_tensors="pt")
    written = None if compensate == "none" else out.tensors
    with masked(out.dense, out.result.plan.layers, written) as model:
        assert (logits(model, batch.input_ids) - found).abs().max().item() == 0.0
        greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        assert model.generate(**batch, **greedy, use_cache=False).tolist() == ids
