"""`verify` of ONNX directories, changed by someone who also wrote the manifest anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import CASE, Exported, refused, write_texts
from onnx_exports import FILES, change_json, changed_graph, copied, exported_onnx, place, seal
from onnx_exports import initializer as tensor

import spp_export
from spp_export.common.errors import CheckpointError, ModelError, PlanError, SppError
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.checks import check_graph
from spp_export.formats.onnx.runtime import OrtModel

pytestmark = pytest.mark.thinned(most=8)

NAME = "mistral-window-tied"
INT4 = OnnxOptions(quant="int4")
INTEGRITY = "files as the manifest lists them"
FORM = "configs and graph as the plan makes them"
WEIGHTS = "weights as the plan keeps them"


@pytest.fixture(scope="module")
def good(workshop) -> Exported:
    return exported_onnx(workshop, NAME)


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return copied(good.path, tmp_path / "copy")


def of_form(workshop, tmp_path, options) -> Path:
    return copied(
        exported_onnx(workshop, NAME, "per-layer", "none", options).path, tmp_path / "copy"
    )


def check(path: Path, good: Exported, **options):
    return spp_export.verify(path, model=str(good.dense), **options)


def only_failure(report) -> tuple[str, str]:
    (failure,) = report.failures
    assert "\n" not in failure.describe()
    return failure.name, failure.describe()


def failure_of_sealed(path: Path, good: Exported) -> tuple[str, str]:
    seal(path)
    return only_failure(check(path, good))


def rewrite(directory: Path, name: str, change) -> None:
    """Give a weight, in the graph or beside it, other values of the same type and shape."""
    with changed_graph(directory) as model:
        stored = tensor(model, name)
        values = onnx.numpy_helper.to_array(stored, str(directory))
        made = np.ascontiguousarray(change(values.copy()), values.dtype)
        assert made.shape == values.shape
        if stored.raw_data:
            stored.raw_data = made.tobytes()
    if stored.raw_data:
        return
    with (directory / "model.onnx_data").open("r+b") as file:
        file.seek(int(place(stored)["offset"]))
        file.write(made.tobytes())


def bump(values, at, by):
    values[at] += by
    return values


@pytest.mark.parametrize("file", sorted(FILES))
def test_one_flipped_bit_is_found_in_every_file(copy, good, file):
    path = copy / file
    data = bytearray(path.read_bytes())
    for where in (0, len(data) // 2, len(data) - 2):
        damaged = data.copy()
        damaged[where] ^= 1
        path.write_bytes(damaged)
        name, text = only_failure(check(copy, good))
        assert name == INTEGRITY
        assert file in text or file == "manifest.json"
    path.write_bytes(data)
    assert check(copy, good).passed


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        ("layers.0.qkv_proj.weight", lambda w: bump(w, (3, 5), 1e-6)),
        ("layers.1.qkv_proj.weight", lambda w: np.roll(w, 16, 1)),
        ("layers.2.o_proj.weight", lambda w: w[::-1]),
        ("layers.1.down_proj.weight", lambda w: w * 1.001),
        ("embed_tokens.weight", lambda w: bump(w, 262, 1e-3)),
    ],
)
def test_changed_weights_are_found(copy, good, weight, change):
    rewrite(copy, weight, change)
    name, text = failure_of_sealed(copy, good)
    assert name == WEIGHTS
    assert "is not what it was made from" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(copy, good, value):
    rewrite(copy, "layers.1.up_proj.weight", lambda w: bump(w, (0, 0), value))
    name, text = failure_of_sealed(copy, good)
    assert name == WEIGHTS
    assert "layers.1.mlp.up_proj.weight" in text
    assert "not finite" in text


def test_refitted_weights_must_be_finite_too(workshop, tmp_path):
    out = exported_onnx(workshop, NAME, "per-layer", "lstsq")
    copy = copied(out.path, tmp_path / "copy")
    rewrite(copy, "layers.1.o_proj.weight", lambda w: bump(w, (0, 0), float("nan")))
    assert failure_of_sealed(copy, out)[0] == WEIGHTS


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (OnnxOptions(precision="fp16"), ("layers.0.qkv_proj.weight", lambda w: w * 1.002)),
        (INT4, ("layers.0.gate_proj.quantised", lambda w: w[::-1])),
        (INT4, ("layers.0.gate_proj.scales", lambda w: w * 1.5)),
        (INT4, ("layers.2.down_proj.zero_points", lambda w: w + 20)),
        (OnnxOptions(quant="int8"), ("embed_tokens.quantised", lambda w: np.roll(w, 1, 0))),
        (OnnxOptions(quant="int8-dynamic"), ("layers.1.o_proj.int8", lambda w: -w)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_changed_weights_are_found_in_other_forms(workshop, tmp_path, good, options, change):
    copy = of_form(workshop, tmp_path, options)
    rewrite(copy, *change)
    assert failure_of_sealed(copy, good)[0] == WEIGHTS


def test_an_untied_embedding_is_exact_beside_quantised_weights(workshop, tmp_path):
    out = exported_onnx(workshop, "llama-gqa-bias", "per-layer", "none", INT4)
    copy = copied(out.path, tmp_path / "copy")
    rewrite(copy, "embed_tokens.weight", lambda w: w * 1.01)
    assert failure_of_sealed(copy, out)[0] == WEIGHTS


def test_swapped_layers_are_found(copy, good):
    """Layers of equal shapes, by where their data lies."""
    with changed_graph(copy) as model:
        one, other = (tensor(model, f"layers.{index}.gate_proj.weight") for index in (0, 1))
        saved = onnx.TensorProto.FromString(one.SerializeToString())
        del one.external_data[:]
        one.external_data.extend(other.external_data)
        del other.external_data[:]
        other.external_data.extend(saved.external_data)
    assert failure_of_sealed(copy, good)[0] == WEIGHTS


def attribute(node, name):
    return next(entry for entry in node.attribute if entry.name == name)


def drop_attribute(node, name):
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def of_kind(model, kind):
    return next(node for node in model.graph.node if node.op_type == kind)


def no_rotary(model):
    attribute(of_kind(model, "GroupQueryAttention"), "do_rotary").i = 0


def no_window(model):
    drop_attribute(of_kind(model, "GroupQueryAttention"), "local_window_size")


def wider_window(model):
    attribute(of_kind(model, "GroupQueryAttention"), "local_window_size").i = 500


def other_scale(model):
    attribute(of_kind(model, "GroupQueryAttention"), "scale").f = 0.2500001


def other_epsilon(model):
    attribute(of_kind(model, "SkipSimplifiedLayerNormalization"), "epsilon").f = 1e-5


def without_guard(model):
    node = of_kind(model, "GroupQueryAttention")
    assert model.graph.node[4].op_type in ("Sub", "Gather", "Add")
    cast = next(n for n in model.graph.node if n.output[0] == node.input[5])
    cast.input[0] = "mask/last_token"


def crossed_inputs(model):
    node = of_kind(model, "Mul")
    node.input[1] = node.input[0]


def renamed_output(model):
    model.graph.output[1].name, model.graph.output[2].name = "present.0.value", "present.0.key"


def older_opset(model):
    model.opset_import[0].version += 1


def extra_node(model):
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["logits"], ["again"], name="x"))


def one_node_less(model):
    del model.graph.node[-1]


@pytest.mark.parametrize("quant", [None, "int4"])
@pytest.mark.parametrize(
    "change",
    [
        no_rotary,
        no_window,
        wider_window,
        other_scale,
        other_epsilon,
        without_guard,
        crossed_inputs,
        extra_node,
    ],
)
def test_another_graph_is_found(workshop, tmp_path, good, change, quant):
    """Also where no logit tells it, and where rounding would hide it."""
    copy = of_form(workshop, tmp_path, OnnxOptions(quant=quant))
    with changed_graph(copy) as model:
        change(model)
    name, text = failure_of_sealed(copy, good)
    assert name == FORM
    assert "model.onnx differs from the plan in" in text


@pytest.mark.parametrize("change", [renamed_output, older_opset, one_node_less])
def test_a_graph_that_no_longer_holds_together_is_found(copy, good, change):
    with changed_graph(copy) as model:
        change(model)
    assert failure_of_sealed(copy, good)[0] in (FORM, "onnx.checker and shape inference")


@pytest.mark.parametrize("heads", ["num_heads", "kv_num_heads"])
def test_other_head_counts_are_found(copy, good, heads):
    with changed_graph(copy) as model:
        attribute(of_kind(model, "GroupQueryAttention"), heads).i += 1
    assert failure_of_sealed(copy, good)[0] == FORM


@pytest.mark.parametrize("options", [OnnxOptions("gqa-bias"), OnnxOptions("standard")], ids=str)
@pytest.mark.parametrize("removed", ["causal", "inside", "RotaryEmbedding"])
def test_a_mask_or_rotary_embedding_left_out_is_found(workshop, tmp_path, good, options, removed):
    copy = of_form(workshop, tmp_path, options)
    with changed_graph(copy) as model:
        (node, *_) = (n for n in model.graph.node if removed in n.name)
        if removed == "RotaryEmbedding":
            for other in model.graph.node:
                for index, name in enumerate(other.input):
                    if name == node.output[0]:
                        other.input[index] = node.input[0]
        else:
            node.op_type = {"LessOrEqual": "Greater", "Greater": "LessOrEqual"}[node.op_type]
    assert failure_of_sealed(copy, good)[0] == FORM


@pytest.mark.parametrize("table", ["cos_cache", "sin_cache"])
def test_a_changed_position_far_behind_is_found(copy, good, table):
    """No text that is compared reaches it."""
    rewrite(copy, table, lambda w: bump(w, (1000, 0), 0.01))
    name, text = failure_of_sealed(copy, good)
    assert (name, table in text) == (FORM, True)


def test_a_changed_constant_is_found(workshop, tmp_path, good):
    copy = of_form(workshop, tmp_path, OnnxOptions("standard"))
    with changed_graph(copy) as model:
        window = tensor(model, "window_6")
        window.raw_data = np.int64(60).tobytes()
    assert failure_of_sealed(copy, good)[0] == FORM


def test_a_view_of_other_bytes_is_found(workshop, tmp_path, good):
    """The quantised embedding is seen twice: by the head, and by the lookup of rows."""
    copy = of_form(workshop, tmp_path, OnnxOptions(quant="int8"))
    with changed_graph(copy) as model:
        shown = tensor(model, "embed_tokens.table")
        offset = next(entry for entry in shown.external_data if entry.key == "offset")
        offset.value = "0"
    name, text = failure_of_sealed(copy, good)
    assert (name, "embed_tokens.table" in text) == (FORM, True)


def test_full_precision_that_calls_itself_quantised_is_found(copy, good):
    """Its weights would else only be compared as closely as four bits allow."""
    change_json(copy / "config.json", lambda config: config["spp_onnx"].update(quant="int4"))
    assert failure_of_sealed(copy, good)[0] == FORM


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 4),
        ("num_key_value_heads_per_layer", [1, 1, 1]),
        ("sliding_window", None),
        ("eos_token_id", 5),
        ("new_key", 1),
        ("auto_map", {"AutoConfig": "evil.Config"}),
    ],
)
def test_a_config_that_says_something_else_is_found(copy, good, key, value):
    change_json(copy / "config.json", lambda config: config.update({key: value}))
    name, text = failure_of_sealed(copy, good)
    assert name == FORM
    assert f"'{key}' of config.json differs from the plan" in text


def test_settings_of_the_generator_are_found(copy, good):
    """genai would load a library that its settings name."""

    def add(config):
        options = config["model"]["decoder"]["session_options"]
        options["custom_ops_library"] = "evil.so"

    change_json(copy / "genai_config.json", add)
    assert failure_of_sealed(copy, good) == (
        FORM,
        "'model' of genai_config.json differs from the plan.",
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda config: config.pop("spp_onnx"), "config.json has no spp_onnx"),
        (lambda config: config.update(spp_onnx=[1]), "config.json has no spp_onnx"),
        (
            lambda config: config["spp_onnx"].update(attention="x" * 999),
            "spp_onnx of config.json is malformed",
        ),
        (
            lambda config: config["spp_onnx"].update(precision=["fp32"]),
            "spp_onnx of config.json is malformed",
        ),
        (
            lambda config: config["spp_onnx"].update(quant={}),
            "spp_onnx of config.json is malformed",
        ),
    ],
    ids=["none", "list", "attention", "precision", "quant"],
)
def test_a_config_that_does_not_say_its_form_is_refused(copy, good, change, match):
    change_json(copy / "config.json", change)
    seal(copy)
    with refused(ModelError, match) as caught:
        check(copy, good)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 400
    with refused(SppError, "spp_onnx|expected one of"):
        OrtModel.load(copy)


SECRET = b"not for you" * 100


def put(model, name="layers.0.qkv_proj.weight", **entries):
    """Say of a weight that its data lies elsewhere."""
    found = place(tensor(model, name)) | entries
    del tensor(model, name).external_data[:]
    for key, value in found.items():
        tensor(model, name).external_data.add(key=key, value=value)


def twice(model):
    put(model)
    tensor(model, "layers.0.qkv_proj.weight").external_data.add(key="location", value="../secret")


def many_bytes(model):
    tensor(model, "layers.0.qkv_proj.weight").dims[0] = 1 << 50


def negative_side(model):
    tensor(model, "layers.0.qkv_proj.weight").dims[0] = -1


def odd_type(model):
    tensor(model, "layers.0.qkv_proj.weight").data_type = onnx.TensorProto.STRING


def inline_is_short(model):
    found = next(t for t in model.graph.initializer if t.raw_data)
    found.raw_data = found.raw_data[:-1]


def custom_domain(model):
    model.graph.node[0].domain = "evil.ops"
    model.opset_import.add(domain="evil.ops", version=1)


def data_in_a_node(model):
    hidden = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=1)
    hidden.external_data.add(key="location", value="../secret")
    model.graph.node.append(onnx.helper.make_node("Shape", ["logits"], ["x"], value=hidden))


def a_subgraph(model):
    inner = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", inner))


def a_function(model):
    model.functions.add(name="f", domain="com.microsoft")


def sparse(model):
    model.graph.sparse_initializer.add()


HOSTILE = {
    "parent": (lambda m: put(m, location="../secret"), r"lies in '../secret'"),
    "absolute": (lambda m: put(m, location="/etc/passwd"), "lies in '/etc/passwd'"),
    "same file": (lambda m: put(m, location="./model.onnx_data"), "lies in './model.onnx_data'"),
    "no location": (lambda m: put(m, location=""), "lies in ''"),
    "memory": (lambda m: put(m, location="*/_ORT_MEM_ADDR_/*"), "lies in '.*_ORT_MEM"),
    "twice": (twice, "says oddly where its data lies"),
    "unknown key": (lambda m: put(m, basepath="../"), "says oddly where its data lies"),
    "negative offset": (lambda m: put(m, offset="-8"), "has not the .* bytes of its shape"),
    "odd offset": (lambda m: put(m, offset="٣"), "has not the .* bytes of its shape"),
    "long offset": (lambda m: put(m, offset="9" * 5000), "has not the .* bytes of its shape"),
    "far offset": (lambda m: put(m, offset=str(1 << 59)), "has .* bytes, but weight"),
    "overflow": (lambda m: put(m, offset=str((1 << 64) - 8)), "has not the .* bytes"),
    "length": (lambda m: put(m, length="8"), "has not the .* bytes of its shape"),
    "dims": (many_bytes, "has not the .* bytes of its shape"),
    "negative side": (negative_side, "has a type or shape that spp never writes"),
    "type": (odd_type, "has a type or shape that spp never writes"),
    "inline": (inline_is_short, "has not the .* bytes of its shape"),
    "domain": (custom_domain, "of domain 'evil.ops', which spp never uses"),
    "node": (data_in_a_node, "has 'value', which is no number"),
    "subgraph": (a_subgraph, "has 'then_branch', which is no number"),
    "function": (a_function, "has functions, training or sparse weights"),
    "sparse": (sparse, "has functions, training or sparse weights"),
    "empty": (lambda m: m.Clear(), "holds no graph"),
}


def refused_everywhere(copy: Path, good: Exported, match: str) -> None:
    """By `verify`, and by whoever opens a graph, in the same line."""
    for read in (lambda: check(copy, good), lambda: check_graph(copy), lambda: OrtModel.load(copy)):
        with refused(CheckpointError, match) as caught:
            read()
        assert caught.value.exit_code == 2
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_reaches_elsewhere_is_refused(copy, good, monkeypatch, kind):
    """Before ONNX or ONNX Runtime open it."""
    (copy.parent / "secret").write_bytes(SECRET)
    change, match = HOSTILE[kind]
    with changed_graph(copy) as model:
        change(model)
    seal(copy)
    opened = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *a, **k: opened.append("ort"))
    monkeypatch.setattr("onnx.checker.check_model", lambda *a, **k: opened.append("checker"))
    monkeypatch.setattr("onnx_ir.load", lambda *a, **k: opened.append("ir"))
    refused_everywhere(copy, good, match)
    assert opened == []


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_links_out_of_the_directory_are_refused(copy, good, name):
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to("../elsewhere")
    integrity, text = only_failure(check(copy, good))
    assert (integrity, "is not a regular file" in text) == (INTEGRITY, True)
    for read in (check_graph, OrtModel.load):
        with refused(CheckpointError, f"{name}: is a link that leads out of the model's directory"):
            read(copy)


@pytest.mark.parametrize("left", [0, 1, 1000, -1])
def test_truncated_data_is_refused(copy, good, left):
    data = (copy / "model.onnx_data").read_bytes()
    (copy / "model.onnx_data").write_bytes(data[:left])
    assert only_failure(check(copy, good))[0] == INTEGRITY
    seal(copy)
    refused_everywhere(copy, good, r"model.onnx_data: has \d+ bytes, but weight")


def test_missing_data_is_refused(copy, good):
    (copy / "model.onnx_data").unlink()
    seal(copy)
    refused_everywhere(copy, good, "model.onnx_data: no such file")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_graph_is_refused(copy, good, share):
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[: int(len(data) * share)])
    seal(copy)
    refused_everywhere(copy, good, "model.onnx: is not ONNX")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"PK\3\4 zip", b"{}", b""], ids=repr)
def test_garbage_is_refused(copy, good, content):
    (copy / "model.onnx").write_bytes(content)
    seal(copy)
    refused_everywhere(copy, good, "model.onnx: (is not ONNX|holds no graph)")


def test_a_huge_graph_is_refused_before_it_is_read(copy, good):
    with (copy / "model.onnx").open("r+b") as file:
        file.truncate((32 << 20) + 1)
    seal(copy)
    refused_everywhere(copy, good, "model.onnx: is larger than 32 MiB, the most that is read")


def test_a_folder_in_place_of_the_graph_is_refused(copy, good):
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    (copy / "model.onnx" / "file").write_text("x")
    seal(copy)
    refused_everywhere(copy, good, "model.onnx")


def test_a_weight_that_is_missing_is_found(copy, good):
    with changed_graph(copy) as model:
        model.graph.initializer.remove(tensor(model, "layers.1.up_proj.weight"))
    assert failure_of_sealed(copy, good)[0] in (FORM, "onnx.checker and shape inference")


def test_a_weight_that_nobody_reads_is_found(copy, good):
    with changed_graph(copy) as model:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, "f4"), "spare"))
    assert failure_of_sealed(copy, good)[0] == FORM


def test_the_plan_of_another_export_is_found(workshop, copy, good):
    other = exported_onnx(workshop, NAME, "uniform", "none")
    shutil.copyfile(other.path / "plan.json", copy / "plan.json")
    assert failure_of_sealed(copy, good)[0] == FORM


def test_a_plan_that_keeps_other_heads_of_the_same_shapes_is_found(copy, good):
    document = json.loads((copy / "plan.json").read_text())
    layer = next(layer for layer in document["layers"] if len(layer["kv_heads"]) < 4)
    spare = next(head for head in range(4) if head not in layer["kv_heads"])
    size = len(layer["query_heads"]) // len(layer["kv_heads"])
    kept = sorted({*layer["kv_heads"][1:], spare})
    layer["kv_heads"] = kept
    layer["query_heads"] = [2 * head + i for head in kept for i in range(size)]
    (copy / "plan.json").write_text(json.dumps(document))
    assert failure_of_sealed(copy, good)[0] == WEIGHTS


def test_the_plan_of_another_model_is_refused(workshop, good):
    with refused(PlanError, "plan is for the model with fingerprint"):
        spp_export.verify(good.path, model=str(workshop.dense("qwen3-gqa-tied")))


def test_a_sister_of_the_model_is_told_by_its_weights(good, tmp_path):
    """Same config and shapes, so the same fingerprint, but other weights."""
    sister = CASE[NAME].make(tmp_path, seed=1)
    assert only_failure(spp_export.verify(good.path, model=str(sister)))[0] == WEIGHTS


def test_another_tokenizer_is_found_on_text(workshop, copy, good):
    def swap(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab["1"], vocab["2"] = vocab["2"], vocab["1"]

    change_json(copy / "tokenizer.json", swap)
    seal(copy)
    name, _ = only_failure(check(copy, good, scenario=workshop.scenario))
    assert name == "token ids as the source's tokenizer gives them"


def test_verify_changes_nothing(copy, good):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()}
    check(copy, good)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()}


def test_the_directory_may_lie_anywhere(copy, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check(Path("copy"), good).passed
    assert check(copy.rename(tmp_path / "a name with spaces"), good).passed


@pytest.mark.parametrize("prompts", [["x"], ["é", "酸🧪"], ["1 + 1 = 2 " * 60]], ids=len)
@pytest.mark.parametrize("options", [OnnxOptions(), OnnxOptions("standard"), INT4], ids=str)
def test_any_text_will_do(workshop, good, tmp_path, prompts, options):
    """Single characters, and texts longer than what is looked at."""
    path = write_texts(tmp_path / "text.txt", prompts)
    out = exported_onnx(workshop, NAME, "per-layer", "none", options)
    report = check(out.path, good, scenario=path)
    assert report.passed, report.failures


def test_rows_have_different_lengths_without_a_text_too(good):
    """Four rows of 48 random tokens, the last one cut by three."""
    details = {found.name: found.detail for found in check(good.path, good).checks}
    assert details["ONNX prefill against the oracle"].startswith("192 tokens")
    assert details["ONNX rows of unequal length"].startswith("186 tokens")


def test_random_tokens_follow_the_seed(good):
    found = [check(good.path, good, seed=seed).to_dict() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[2]["passed"]


def test_a_graph_that_is_gone_leaves_no_export(copy, good):
    (copy / "model.onnx").unlink()
    seal(copy)
    assert not check(copy, good).passed


def test_links_of_a_hugging_face_cache_are_followed(good, tmp_path):
    """Which is how a hub's files lie on disk."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(good.path, tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert OrtModel.load(snapshot).logits([[5, 6, 7]]).shape == (1, 3, 263)
