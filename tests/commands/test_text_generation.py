"""`transformers.pipeline` takes an export by its directory: another process, no network."""

from __future__ import annotations

import pytest
from exporting import masked, pipelines_elsewhere
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

PROMPT = "12 + 30 = 42"
CASES = (
    ("llama-gqa-bias", "per-layer"),
    ("qwen3-gqa-tied", "ragged"),
    ("mistral-gqa", "uniform"),
)


@pytest.fixture(scope="module")
def generated(workshop, tmp_path_factory):
    """What the pipeline of each export gives, by one fresh interpreter."""
    jobs = [(str(workshop.exported(*case).path), case[1] != "uniform") for case in CASES]
    found = pipelines_elsewhere(tmp_path_factory.mktemp("pipelines"), PROMPT, jobs)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_generates_what_the_masked_model_does(workshop, generated, case):
    """With its own code trusted, uniform without any."""
    out = workshop.exported(*case)
    module, ids, text = generated[case]
    assert ("modeling_spp" in module) == (case[1] != "uniform")
    tokenizer = AutoTokenizer.from_pretrained(out.dense)
    batch = tokenizer(PROMPT, return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with masked(out.dense, out.result.plan.layers) as model:
        (expected,) = model.generate(**batch, **greedy, use_cache=False).tolist()
    assert ids == expected
    assert text == tokenizer.decode(expected[batch.input_ids.shape[1] :], skip_special_tokens=True)
