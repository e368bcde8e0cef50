"""The published artifact format, written here as its scripts write it, to ours."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch

from spp_export.common.errors import ArtifactsError
from spp_export.data.artifacts import check_model, read_artifacts, write_artifacts
from spp_export.data.published_artifacts import PUBLISHED_DOMAINS, import_published
from spp_export.models.shape import ModelShape

LAYERS, HEADS, DOMAINS, HIDDEN = 4, 3, 6, 5
NAMES = ["a", "b", "c", "d", "e", "f"]


def write_json(path, value):
    path.write_text(json.dumps(value))


def probe_file(path, layer, **changes):
    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = torch.nn.Linear(HIDDEN, DOMAINS)

    torch.manual_seed(layer)
    probe = Probe()
    state = {
        "state_dict": probe.state_dict(),
        "input_dim": HIDDEN,
        "num_domains": DOMAINS,
        "hidden_dim": None,
        "nonlinear": False,
    }
    torch.save({**state, **changes}, path)
    return probe.classifier


@pytest.fixture
def importance():
    return np.random.default_rng(0).random((LAYERS, HEADS, DOMAINS)).astype(np.float32)


@pytest.fixture
def published(tmp_path, importance):
    root = tmp_path / "some-model" / "ppd_pipeline"
    probes = root / "probe1_base.pt"
    probes.mkdir(parents=True)
    write_json(
        probes / "metadata.json",
        {"num_layers": LAYERS, "num_domains": DOMAINS, "layer_indices": [0, 2, 3]},
    )
    for layer in (0, 2, 3):
        probe_file(probes / f"probe_layer_{layer}.pt", layer)
    write_json(
        root / "head_importance.pt",
        {
            "num_layers": LAYERS,
            "num_heads_per_layer": HEADS,
            "num_domains": DOMAINS,
            "importance": {str(layer): importance[layer].tolist() for layer in range(LAYERS)},
        },
    )
    write_json(root / "whitelist.json", [[0, 0], [3, 2]])
    write_json(
        root / "probe_temperatures.json",
        {
            "probe1": 1.0,
            "probe2_single_domain": 0.7,
            "probe3_ood": 1.5,
            "probe4_cross_domain": 1.1,
            "probe2_single_domain_layer_wise": {"2": 0.5, "3": 0.75},
            "probe3_ood_layer_wise": {"2": 1.5, "3": 2},
            "probe4_cross_domain_layer_wise": {"3": 1.25},
        },
    )
    return root


def test_values(published, importance):
    artifacts = import_published(published)
    assert artifacts.domains == PUBLISHED_DOMAINS
    assert artifacts.fingerprint == ""
    assert artifacts.whitelist == ((0, 0), (3, 2))
    assert list(artifacts.importance) == ["head/published"]
    np.testing.assert_array_equal(
        artifacts.importance["head/published"], importance.transpose(2, 0, 1)
    )
    for layer in (0, 2, 3):
        torch.manual_seed(layer)
        expected = torch.nn.Linear(HIDDEN, DOMAINS)
        np.testing.assert_array_equal(artifacts.weight[layer], expected.weight.detach().numpy())
        np.testing.assert_array_equal(artifacts.bias[layer], expected.bias.detach().numpy())
    rows = dict(zip(artifacts.regimes, artifacts.temperature.tolist(), strict=True))
    assert rows == {
        "in-domain": [1.0, 1.0, 0.5, 0.75],
        "cross-domain": [1.0, 1.0, 1.0, 1.25],
        "out-of-domain": [1.0, 1.0, 1.5, 2.0],
    }


def test_layers_are_integers_once_imported(published):
    """The files key layers by strings, as JSON must; nothing of ours does."""
    manifest = import_published(published).manifest
    assert manifest["calibrated_layers"]["in-domain"] == [2, 3]
    for layers in (manifest["probe_layers"], *manifest["calibrated_layers"].values()):
        assert all(type(layer) is int for layer in layers)


def test_a_layer_without_a_probe_is_recorded(published):
    artifacts = import_published(published)
    assert artifacts.probe_layers == (0, 2, 3)
    assert not artifacts.weight[1].any()
    assert not artifacts.bias[1].any()
    assert artifacts.manifest["calibrated_layers"]["cross-domain"] == [3]
    assert artifacts.calibration == ()
    assert not artifacts.axes.any()


def test_the_directory_around_it_and_names(published):
    around = import_published(published.parent, NAMES)
    assert around.domains == tuple(NAMES)
    assert around.manifest["domain_names"] == "given"
    # Nothing that gets published names a directory of this machine.
    assert str(published.parent.parent) not in json.dumps(around.manifest)


def test_round_trip_through_our_format(published, tmp_path):
    (tmp_path / "ours").mkdir()
    written = write_artifacts(import_published(published), tmp_path / "ours")
    read = read_artifacts(tmp_path / "ours")
    assert read.sha256 == written.sha256
    assert read.probe_layers == (0, 2, 3)
    shape = ModelShape("llama", LAYERS, HIDDEN, HEADS, 1, 2, 7, 10, True, 2)
    note = check_model(read, "e" * 64, shape)
    assert note is not None
    assert "do not say which model" in note


def test_regimes_without_temperatures(published):
    write_json(published / "probe_temperatures.json", {"probe1": 1.0})
    artifacts = import_published(published)
    assert (artifacts.temperature == 1).all()
    assert artifacts.manifest["calibrated_layers"]["in-domain"] == []


def test_domain_names_must_fit(published):
    with pytest.raises(ArtifactsError, match="have 6 domains and 2 names were given; name all 6"):
        import_published(published, ["a", "b"])
    with pytest.raises(ArtifactsError, match="distinct names"):
        import_published(published, ["a"] * 6)


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    write_json(path, value)


@pytest.mark.parametrize(
    ("file", "edit", "match"),
    [
        ("head_importance.pt", lambda v: v.pop("num_layers"), "'num_layers' to be a positive"),
        ("head_importance.pt", lambda v: v.update(num_layers=10**9), "'num_layers' to be a pos"),
        (
            "head_importance.pt",
            lambda v: v.update(num_layers=True),
            "'num_layers' to be a positive",
        ),
        ("head_importance.pt", lambda v: v.update(num_layers=5), "of 5 layers, got 4"),
        ("head_importance.pt", lambda v: v.update(num_layers=3), "layers 0 to 2, got '3'"),
        ("head_importance.pt", lambda v: v.update(importance=[]), "object 'importance' keyed by"),
        (
            "head_importance.pt",
            lambda v: v["importance"].update({"01": v["importance"].pop("1")}),
            "expected layers 0 to 3, got '01'",
        ),
        ("head_importance.pt", lambda v: v["importance"]["1"].pop(), "layer 1: .* of 3 heads"),
        ("head_importance.pt", lambda v: v["importance"]["1"][2].pop(), "head 2: .* of 6 scores"),
        (
            "head_importance.pt",
            lambda v: v["importance"]["1"][2].__setitem__(0, "0.5"),
            "layer 1, head 2: expected a number, got '0.5'",
        ),
        (
            "head_importance.pt",
            lambda v: v["importance"]["1"][2].__setitem__(0, 10**400),
            "layer 1, head 2: expected a number",
        ),
        ("probe1_base.pt/metadata.json", lambda v: v.update(layer_indices=[]), "not empty"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(layer_indices=[4]), "got 4"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(layer_indices=["0"]), "got '0'"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(layer_indices=[0, 0]), "twice"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(layer_indices=[1]), "_1.pt: no such"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(num_layers=9), "num_layers is 9"),
        ("probe1_base.pt/metadata.json", lambda v: v.update(num_domains=5), "num_domains is 5"),
        ("whitelist.json", lambda v: v.append([4, 0]), "layer 4, head 0 does not exist"),
        ("whitelist.json", lambda v: v.append([0]), r"\[layer, head\]"),
        (
            "probe_temperatures.json",
            lambda v: v["probe3_ood_layer_wise"].update({"4": 1.0}),
            "probe3_ood_layer_wise: expected layers 0 to 3, got '4'",
        ),
        (
            "probe_temperatures.json",
            lambda v: v["probe3_ood_layer_wise"].update({"2": "hot"}),
            "layer 2: expected a number",
        ),
        (
            "probe_temperatures.json",
            lambda v: v["probe3_ood_layer_wise"].update({"2": 0.0}),
            "temperatures above 0",
        ),
    ],
)
def test_bad_json(published, file, edit, match):
    change(published / file, edit)
    with pytest.raises(ArtifactsError, match=match) as caught:
        import_published(published)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "head_importance.pt",
        "whitelist.json",
        "probe_temperatures.json",
        "probe1_base.pt/metadata.json",
        "probe1_base.pt/probe_layer_2.pt",
    ],
)
def test_missing_file(published, file):
    (published / file).unlink()
    with pytest.raises(ArtifactsError, match=f"{file}: no such file"):
        import_published(published)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


def linear(weight, bias=None):
    bias = torch.zeros(DOMAINS) if bias is None else bias
    return {"state_dict": {"classifier.weight": weight, "classifier.bias": bias}}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Payload(), "cannot be read as weights"),
        ({"state_dict": Payload()}, "cannot be read as weights"),
        ([1], "expected a linear probe"),
        ({"state_dict": {"classifier.0.weight": torch.zeros(6, 5)}}, "expected a linear probe"),
        (linear([1.0]), "classifier.weight: expected a tensor"),
        (linear(torch.zeros(6, 5, dtype=torch.int64)), "expected a tensor of floating-point"),
        (linear(torch.zeros(1).expand(6, 10**12)), "expected a dense, contiguous tensor"),
        (linear(torch.zeros(6, 5).to_sparse()), "expected a dense, contiguous tensor"),
        (linear(torch.zeros(6, 10**12, device="meta")), "contiguous tensor|cannot be read"),
        (linear(torch.zeros(5, 5)), r"expected weight \[6, hidden\] and bias \[6\], got \(5, 5\)"),
        (linear(torch.zeros(6, 0)), r"expected weight \[6, hidden\]"),
        (linear(torch.zeros(6, 5), torch.zeros(1, 6)), r"and \(1, 6\)"),
        (linear(torch.full((6, 5), torch.nan)), "weight: holds a value that is not finite"),
        (linear(torch.zeros(6, 4)), r"probes differ in hidden size: \[4, 5\]"),
    ],
)
def test_bad_probe(published, value, match):
    torch.save(value, published / "probe1_base.pt" / "probe_layer_2.pt")
    with pytest.raises(ArtifactsError, match=match) as caught:
        import_published(published)
    assert "\n" not in str(caught.value)


def test_half_precision_probes(published):
    path = published / "probe1_base.pt" / "probe_layer_2.pt"
    torch.save(linear(torch.full((6, 5), 0.5, dtype=torch.bfloat16)), path)
    assert (import_published(published).weight[2] == 0.5).all()


def test_bytes_that_are_no_torch_file(published):
    path = published / "probe1_base.pt" / "probe_layer_2.pt"
    whole = path.read_bytes()
    for data in (b"", b"garbage", whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ArtifactsError, match=r"probe_layer_2.pt: cannot be read as weights"):
            import_published(published)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * 1000)
    with pytest.raises(ArtifactsError, match=r"as weights \(a compressed archive\)"):
        import_published(published)


def test_not_a_published_directory(tmp_path):
    with pytest.raises(ArtifactsError, match=r"head_importance.pt: no such file"):
        import_published(tmp_path)
