"""`verify` on good directories, and on every way to damage one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from exporting import CASE, Exported, stored, write_texts
from safetensors.torch import save_file

import spp_export
from spp_export.common.errors import CheckpointError, ModelError, OutputError, PlanError
from spp_export.common.manifest import write_manifest

pytestmark = pytest.mark.thinned(most=8)

NAME = "llama-gqa-bias"
FILES = (
    "README.md",
    "config.json",
    "configuration_spp.py",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "modeling_spp.py",
    "plan.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verify.json",
)


@pytest.fixture(scope="module")
def good(workshop) -> Exported:
    return workshop.exported(NAME, "per-layer", "none")


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return shutil.copytree(good.path, tmp_path / "copy")


def check(path: Path, good: Exported, **options):
    return spp_export.verify(path, model=str(good.dense), **options)


def seal(path: Path) -> None:
    """What someone who wants to be believed would do after a change."""
    (path / "manifest.json").unlink()
    write_manifest(path)


def only_failure(report) -> str:
    (failure,) = report.failures
    assert "\n" not in failure.describe()
    return f"{failure.name}: {failure.describe()}"


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("compensate", ["none", "lstsq", "bias"])
def test_a_good_directory_passes(workshop, layout, compensate):
    """With the scenario, and on random tokens without it."""
    out = workshop.exported(NAME, layout, compensate)
    with_text = check(out.path, out, scenario=workshop.scenario)
    without = check(out.path, out)
    assert with_text.passed, with_text.failures
    assert without.passed, without.failures
    assert len(with_text.checks) == len(without.checks) + 1  # the tokenizer's ids
    assert with_text.to_dict()["schema_version"] == 1
    json.dumps(with_text.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_it_passes_in_every_precision(good, dtype):
    report = check(good.path, good, dtype=dtype)
    assert report.passed, report.failures
    assert report.context["computed_in"] == dtype


def test_the_directory_may_lie_anywhere(copy, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check(Path("copy"), good).passed
    assert check(copy.rename(tmp_path / "a name with spaces"), good).passed


def test_verify_changes_nothing(copy, good):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()}
    check(copy, good)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()}


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found_in_every_file(copy, good, file):
    assert {path.name for path in copy.iterdir()} == set(FILES)
    path = copy / file
    data = bytearray(path.read_bytes())
    for place in (0, len(data) // 2, len(data) - 2):
        damaged = data.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        failure = only_failure(check(copy, good))
        assert failure.startswith("files as the manifest lists them: ")
        # A changed entry of the manifest blames the file that it is about.
        assert file in failure or file == "manifest.json"
    path.write_bytes(data)
    assert check(copy, good).passed


def test_files_that_come_and_go_are_named(copy, good):
    (copy / "extra.bin").write_bytes(b"x")
    (copy / "tokenizer.json").unlink()
    failure = only_failure(check(copy, good))
    assert "extra.bin: not in the manifest" in failure
    assert "tokenizer.json: missing" in failure


def test_a_truncated_shard_is_found(copy, good):
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors: has" in only_failure(check(copy, good))
    seal(copy)
    with pytest.raises(CheckpointError, match=r"model.safetensors") as caught:
        check(copy, good)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [("per-layer", "lstsq"), ("uniform", "none")], ids=" ".join)
def test_the_plan_of_another_export_is_found(workshop, copy, good, other):
    plan = workshop.exported(NAME, *other).path / "plan.json"
    shutil.copyfile(plan, copy / "plan.json")
    assert "plan.json: " in only_failure(check(copy, good))
    seal(copy)
    failure = only_failure(check(copy, good))
    assert failure.startswith("keys, shapes, dtypes and finite values: config.json differs")


def test_a_plan_that_keeps_other_heads_of_the_same_shapes_is_found(copy, good):
    """Nothing but the logits can tell."""
    document = json.loads((copy / "plan.json").read_text())
    group = next(layer for layer in document["layers"] if len(layer["query_heads"]) < 8)
    missing = next(head for head in range(4) if head not in group["kv_heads"])
    kept = (set(group["kv_heads"]) - {group["kv_heads"][0]}) | {missing}
    size = len(group["query_heads"]) // len(group["kv_heads"])
    group["kv_heads"] = sorted(kept)
    group["query_heads"] = [2 * head + i for head in sorted(kept) for i in range(size)]
    (copy / "plan.json").write_text(json.dumps(document))
    seal(copy)
    assert only_failure(check(copy, good)).startswith("logits parity")


def test_the_plan_of_another_model_is_refused(workshop, copy, good):
    with pytest.raises(PlanError, match="plan is for the model with fingerprint") as caught:
        spp_export.verify(copy, model=str(workshop.dense("qwen3-gqa-tied")))
    assert caught.value.exit_code == 2


def test_a_sister_of_the_model_is_told_by_its_logits(good, tmp_path):
    """Same config and shapes, so the same fingerprint, but other weights."""
    sister = CASE[NAME].make(tmp_path, seed=1)
    failure = only_failure(spp_export.verify(good.path, model=str(sister)))
    assert failure.startswith("logits parity with the masked dense model")


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t.roll(16, 0)),
        ("model.layers.0.self_attn.k_proj.weight", lambda t: t.flip(0)),
        ("model.layers.2.self_attn.v_proj.bias", torch.zeros_like),
        ("model.layers.1.self_attn.o_proj.weight", lambda t: t.roll(1, 1)),
        ("model.layers.1.mlp.down_proj.weight", lambda t: t * 1.001),
        ("model.norm.weight", lambda t: t + 0.01),
        ("lm_head.weight", lambda t: t.roll(1, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sealed_but_wrong_weights_are_found(copy, good, tensor, change):
    tensors = stored(copy)
    tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    seal(copy)
    assert only_failure(check(copy, good)).startswith("logits parity")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"x": torch.ones(1)}), "x: in the files or in the plan but not in"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: in the files or in the plan"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
            r"model.norm.weight: F16 \[64\], expected F32 \[64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"model.norm.weight: F32 \[63\], expected F32 \[64\]",
        ),
    ],
    ids=["extra", "missing", "dtype", "shape"],
)
def test_sealed_but_odd_tensors_are_named(copy, good, change, match):
    tensors = stored(copy)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    seal(copy)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(only_failure(check(copy, good)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(copy, good, value):
    tensors = stored(copy)
    tensors["model.norm.weight"][5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    seal(copy)
    failure = only_failure(check(copy, good))
    assert failure == (
        "keys, shapes, dtypes and finite values: tensor 'model.norm.weight' has a value that is "
        "not finite in rows 0 to 63. The checkpoint is damaged."
    )


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 1.0}, {"num_attention_heads": 4}, {"auto_map": {}}, {"new_key": 1}],
    ids=str,
)
def test_a_sealed_config_that_says_something_else_is_found(copy, good, change):
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    seal(copy)
    failure = only_failure(check(copy, good))
    assert f"config.json differs from the plan in {next(iter(change))}" in failure


def test_another_tokenizer_is_found_on_text(workshop, copy, good):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    seal(copy)
    failure = only_failure(check(copy, good, scenario=workshop.scenario))
    assert failure.startswith("token ids as the source's tokenizer gives them")


def test_what_is_no_export_is_an_error(workshop, tmp_path, good):
    nothing = tmp_path / "nothing"
    for path in (tmp_path, nothing, good.dense, workshop.artifacts(NAME)):
        message = (
            "no such directory" if path == nothing else "no plan.json, so not an export of spp"
        )
        with pytest.raises(OutputError, match=message) as caught:
            check(path, good)
        assert caught.value.exit_code == 2
    with pytest.raises(ModelError, match="no such directory"):
        spp_export.verify(good.path, model=str(tmp_path / "nothing"))


def test_random_tokens_follow_the_seed(good):
    """Another seed, other tokens, the same verdict."""
    found = [check(good.path, good, seed=seed).to_dict() for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[1] != found[2]
    assert found[2]["passed"]


@pytest.mark.parametrize("prompts", [["x"], ["é", "酸🧪"], ["1 + 1 = 2 " * 60]], ids=len)
def test_any_text_will_do(good, tmp_path, prompts):
    """Single characters, and texts longer than what is looked at."""
    path = write_texts(tmp_path / "text.txt", prompts)
    report = check(good.path, good, scenario=path)
    assert report.passed, report.failures
