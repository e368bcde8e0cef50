from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from dense_models import CONFIGS, config_of, random_tensors, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spp_export.common.errors import CheckpointError, OutputError, PlanError
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.checkpoint.reader import blocks
from spp_export.models.families import Role
from spp_export.planning import LayerPlan, Plan
from spp_export.planning.written import slim_shape
from spp_export.slicing import weights as slim
from spp_export.slicing.weights import write_slim_weights

# Groups of two query heads. One head per group, whole groups, everything, channels too.
PER_LAYER = (
    LayerPlan((0, 2, 3), (1, 4, 7), (0, 5, 6, 39)),
    LayerPlan((1,), (2, 3), None),
    LayerPlan((0, 1, 2, 3), tuple(range(8)), tuple(range(8, 40))),
)
CONSUMERS = ("self_attn.o_proj", "mlp.down_proj")
UNIFORM = (
    LayerPlan((0, 3), (0, 1, 6, 7), tuple(range(0, 40, 2))),
    LayerPlan((1, 2), (2, 3, 4, 5), tuple(range(20))),
    LayerPlan((2, 3), (4, 5, 6, 7), tuple(range(20, 40))),
)


def plan_for(source, layers=PER_LAYER, layout="per-layer"):
    return Plan(source.fingerprint, source.name, layout, "none", tuple(layers))


def dense(directory, family="llama", *, dtype=torch.float32, shards=1, edit=None, **changes):
    config = config_of(family, **changes)
    tensors = random_tensors(config, dtype)
    if edit:
        edit(tensors)
    return open_source(write_model(directory, config, tensors, shards)), tensors


def load(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def stays(units, step):
    """Kept elements of an axis, as a list of positions."""
    return [unit * step + offset for unit in units for offset in range(step)]


def sliced_by_hand(name, tensor, layers):
    """What the names of a Hugging Face checkpoint say should stay, by torch's own indexing."""
    parts = name.split(".")
    if parts[1] != "layers" or "norm" in name:
        return tensor
    layer, module, kind = layers[int(parts[2])], parts[4], parts[5]
    channels = range(40) if layer.channels is None else layer.channels
    query, kv = stays(layer.query_heads, 4), stays(layer.kv_heads, 4)
    rows = {"q_proj": query, "k_proj": kv, "v_proj": kv}
    rows |= {"gate_proj": list(channels), "up_proj": list(channels)}
    if module in rows:
        return tensor[rows[module]]
    if kind == "bias":
        return tensor
    return tensor[:, {"o_proj": query, "down_proj": list(channels)}[module]]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_against_slicing_by_hand(tmp_path, family, dtype, shards):
    source, tensors = dense(tmp_path / "in", family, dtype=dtype, shards=shards)
    out = tmp_path / "out"
    out.mkdir()
    limit = 10**9 if shards == 1 else 9000
    written = write_slim_weights(source, plan_for(source), out, max_shard_bytes=limit)
    found = load(out)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = sliced_by_hand(name, tensor, PER_LAYER)
        assert found[name].dtype == dtype
        assert torch.equal(found[name], expected), name
    assert {path.name for path in out.iterdir()} == written.records.keys()
    assert written.parameters == sum(tensor.numel() for tensor in found.values())
    assert written.nbytes == sum(tensor.nbytes for tensor in found.values())
    assert written.parameters == source.shape.parameters(
        [layer.shape(source.shape) for layer in PER_LAYER]
    )
    assert (out / "model.safetensors.index.json").exists() == (shards > 1)


def test_small_blocks_make_the_same_file(tmp_path, monkeypatch):
    source, _ = dense(tmp_path / "in", dtype=torch.bfloat16)
    hashes = []
    for size in (4 << 20, 200):
        monkeypatch.setattr(slim, "blocks", functools.partial(blocks, block_bytes=size))
        out = tmp_path / str(size)
        out.mkdir()
        hashes.append(write_slim_weights(source, plan_for(source), out).records)
    assert hashes[0] == hashes[1]


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    def refit(values):
        return values[:, stays(PER_LAYER[0].query_heads, 4)]

    # The embedding has 64 MB; o_proj is the largest tensor that is ever needed whole.
    source, _ = dense(tmp_path / "in", dtype=torch.bfloat16, vocab_size=1_000_000)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        write_slim_weights(
            source,
            plan_for(source),
            tmp_path / "out",
            replaced=lambda spec: (
                refit if spec.name.endswith("0.self_attn.o_proj.weight") else None
            ),
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48e6


def test_thousands_of_tiny_tensors_and_one_of_many_blocks(tmp_path, monkeypatch):
    """A deep, narrow model with a long embedding, in blocks of a few rows."""
    source, tensors = dense(
        tmp_path / "in", dtype=torch.bfloat16, shards=3, num_hidden_layers=300, vocab_size=20_000
    )
    monkeypatch.setattr(slim, "blocks", functools.partial(blocks, block_bytes=10_000))
    layers = PER_LAYER * 100
    (tmp_path / "out").mkdir()
    write_slim_weights(source, plan_for(source, layers), tmp_path / "out", max_shard_bytes=400_000)
    found = load(tmp_path / "out")
    assert len(found) == len(tensors) > 2700
    for name, tensor in tensors.items():
        assert torch.equal(found[name], sliced_by_hand(name, tensor, layers)), name


def test_an_error_while_reading_ahead_is_the_readers_own(tmp_path):
    source, tensors = dense(tmp_path / "in", num_hidden_layers=3)
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    bad["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")
    write_model(tmp_path / "bad", source.config, bad)
    (tmp_path / "out").mkdir()
    damaged = open_source(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.up_proj.weight' has a value that is"):
        write_slim_weights(damaged, plan_for(damaged), tmp_path / "out")
    assert not [one for one in threading.enumerate() if one.name.startswith("spp-")]


def test_uniform_slices_load_and_equal_the_masked_dense_model(tmp_path):
    source, _ = dense(tmp_path / "in", dtype=torch.float64, attention_bias=True)
    out = tmp_path / "out"
    out.mkdir()
    write_slim_weights(source, plan_for(source, UNIFORM, "uniform"), out, max_shard_bytes=9000)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
    (out / "config.json").write_text(json.dumps({**source.config, **sizes}))
    slim_model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float64)
    for layer, plan in zip(masked.model.layers, UNIFORM, strict=True):
        gone = [unit for unit in range(8) if unit not in plan.query_heads]
        layer.self_attn.o_proj.weight.data[:, stays(gone, 4)] = 0
        gone = [unit for unit in range(40) if unit not in plan.channels]
        layer.mlp.down_proj.weight.data[:, gone] = 0
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.allclose(slim_model(tokens).logits, masked(tokens).logits, atol=1e-12)


def test_replaced_weights_are_given_whole_and_rounded_once(tmp_path):
    source, tensors = dense(tmp_path / "in", dtype=torch.bfloat16)
    out, seen = tmp_path / "out", {}
    out.mkdir()

    def replaced(spec):
        if spec.role is not Role.OUTPUT:
            return None

        def refit(values):
            seen[spec.name] = values
            kept = stays(PER_LAYER[spec.layer].query_heads, 4)
            return values[:, kept].astype(np.float64) * 1.001

        return refit

    write_slim_weights(source, plan_for(source), out, replaced=replaced)
    found = load(out)
    for name, tensor in tensors.items():
        expected = sliced_by_hand(name, tensor, PER_LAYER)
        if "o_proj" in name:
            np.testing.assert_array_equal(seen[name], tensor.float().numpy())
            expected = (expected.double() * 1.001).to(torch.bfloat16)
        assert torch.equal(found[name], expected)


def test_in_uniform_a_new_bias_brings_the_biases_that_share_its_switch(tmp_path):
    source, tensors = dense(tmp_path / "in", dtype=torch.float16)
    out, value = tmp_path / "out", np.linspace(-1, 1, 32)
    out.mkdir()
    biases = {(1, Role.OUTPUT): value, (2, Role.DOWN): -value}
    write_slim_weights(source, plan_for(source, UNIFORM, "uniform"), out, biases=biases)
    found = load(out)
    added = found.keys() - tensors.keys()
    assert len(added) == 3 * (4 + 3)
    expected = {
        "model.layers.1.self_attn.o_proj.bias": torch.tensor(value).half(),
        "model.layers.2.mlp.down_proj.bias": torch.tensor(-value).half(),
    }
    for name in added:
        assert found[name].dtype == torch.float16
        weight = found[name.replace("bias", "weight")]
        assert torch.equal(found[name], expected.get(name, torch.zeros(len(weight)).half()))
    config = {**source.config, "attention_bias": True, "mlp_bias": True}
    again = source.family.read_shape(config, 2)
    assert again == slim_shape(source, "uniform", {Role.OUTPUT, Role.DOWN})


@pytest.mark.parametrize("family", CONFIGS)
def test_in_per_layer_a_new_bias_comes_alone(tmp_path, family):
    source, tensors = dense(tmp_path / "in", family)
    out, value = tmp_path / "out", np.linspace(-1, 1, 32)
    out.mkdir()
    biases = {(1, Role.OUTPUT): value, (2, Role.DOWN): -value}
    written = write_slim_weights(source, plan_for(source), out, biases=biases)
    found = load(out)
    names = {f"model.layers.{i}.{m}.bias" for i in range(3) for m in CONSUMERS}
    assert found.keys() == tensors.keys() | names
    for index, module in itertools.product(range(3), CONSUMERS):
        name = f"model.layers.{index}.{module}.bias"
        added = {(1, CONSUMERS[0]): value, (2, CONSUMERS[1]): -value}.get(
            (index, module), 0 * value
        )
        before = tensors[name].double() if name in tensors else 0
        assert torch.equal(found[name], (before + torch.tensor(added)).float())
    shape = slim_shape(source, "per-layer", {Role.OUTPUT, Role.DOWN})
    assert written.parameters == shape.parameters([one.shape(source.shape) for one in PER_LAYER])


def test_a_bias_is_added_to_one_that_is_there(tmp_path):
    source, tensors = dense(tmp_path / "in", "llama-bias")
    out, value = tmp_path / "out", np.linspace(-1, 1, 32)
    out.mkdir()
    write_slim_weights(source, plan_for(source), out, biases={(0, Role.OUTPUT): value})
    name = "model.layers.0.self_attn.o_proj.bias"
    expected = (tensors[name].double() + torch.tensor(value)).float()
    assert torch.equal(load(out)[name], expected)
    assert load(out).keys() == tensors.keys()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("role", [Role.OUTPUT, Role.DOWN])
def test_a_bias_that_a_stock_config_cannot_hold(tmp_path, family, role):
    source, _ = dense(tmp_path / "in", family)
    plan, biases = plan_for(source, UNIFORM, "uniform"), {(0, role): np.zeros(32)}
    with pytest.raises(PlanError, match=f"{family} family has no bias on its {role}"):
        write_slim_weights(source, plan, tmp_path, biases=biases)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_found_cut_or_copied(tmp_path, name, bad):
    def edit(tensors):
        tensors[name].view(-1)[-1] = bad

    source, _ = dense(tmp_path / "in", dtype=torch.bfloat16, edit=edit)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}' has a value that is not finite"):
        write_slim_weights(source, plan_for(source), tmp_path / "out")


def test_a_compensated_value_that_does_not_fit_the_dtype(tmp_path):
    source, _ = dense(tmp_path / "in", dtype=torch.float16)
    (tmp_path / "out").mkdir()
    biases = {(0, Role.OUTPUT): np.full(32, 70000.0)}
    with pytest.raises(
        CheckpointError, match=r"o_proj.bias': a compensated value does not fit F16"
    ):
        write_slim_weights(source, plan_for(source), tmp_path / "out", biases=biases)


def test_a_plan_of_another_model(tmp_path):
    source, _ = dense(tmp_path / "in")
    plan = dataclasses.replace(plan_for(source), model_fingerprint="0" * 64)
    with pytest.raises(PlanError, match="fingerprint"):
        write_slim_weights(source, plan, tmp_path)


def test_progress_ends_at_the_total(tmp_path):
    source, _ = dense(tmp_path / "in")
    (tmp_path / "out").mkdir()
    calls = []
    write_slim_weights(
        source, plan_for(source), tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    total = sum(tensor.nbytes for tensor in load(tmp_path / "out").values())
    assert {call[1] for call in calls} == {total}
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1] == (total, total)


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    source, _ = dense(tmp_path / "in")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="are free"):
        write_slim_weights(source, plan_for(source), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_torch_is_imported():
    modules = "sys, spp_export.slicing.weights, spp_export.calibration.refit"
    code = f"import {modules}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
