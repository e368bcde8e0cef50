"""Which criterion decides where none is named."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from family_models import settings_of

import spp_export
from spp_export.data.artifacts import read_artifacts
from spp_export.models.families import FAMILIES
from spp_export.models.shape import ModelShape, Units
from spp_export.planning.scoring import default_criterion

LLAMA = FAMILIES["llama"].read_shape(settings_of("llama").to_dict(), 4)


@dataclass
class Session:
    device: str = "cpu"
    reads_from_disk: bool = False
    shape: ModelShape = LLAMA

    @property
    def source(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape)


KNOWN = SimpleNamespace(dialogues=(SimpleNamespace(gradients=1), SimpleNamespace(gradients=1)))
IN_PART = SimpleNamespace(dialogues=(SimpleNamespace(gradients=1), SimpleNamespace(gradients=None)))
NONE = SimpleNamespace(dialogues=())


@pytest.mark.parametrize(
    ("session", "artifacts", "compensation", "tokens", "removed", "name"),
    [
        (Session(), KNOWN, "lstsq", 96, 0.2, "fisher"),
        (Session(), KNOWN, "lstsq", 96, 1 - 0.7, "fisher"),
        (Session(), KNOWN, "lstsq", 96, 0.31, "obs"),
        (Session(), KNOWN, "lstsq", 0, 0.2, "obs"),
        (Session(), IN_PART, "lstsq", 96, 0.2, "obs"),
        (Session(), NONE, "lstsq", 96, 0.2, "obs"),
        (Session(reads_from_disk=True), KNOWN, "lstsq", 96, 0.2, "obs"),
        (Session(device="auto"), KNOWN, "lstsq", 96, 0.2, "obs"),
        (Session(), KNOWN, "none", 96, 0.2, "energy"),
        (Session(), KNOWN, "bias", 96, 0.2, "energy"),
    ],
)
def test_it_is_fisher_where_gradients_are_at_hand(
    session, artifacts, compensation, tokens, removed, name
):
    assert default_criterion(session, artifacts, compensation, tokens, removed) == name


@pytest.mark.parametrize(
    ("dense", "units", "name"),
    [
        ([], "heads", "fisher"),
        ([], "both", "obs"),
        ([], "channels", "energy"),
        ([0], "channels", "obs"),
        ([0], "experts", "energy"),
        ([0], "all", "obs"),
        ([0, 1], "channels", "fisher"),
    ],
)
def test_of_experts_alone_it_is_energy(dense: list[int], units: Units, name: str) -> None:
    """For nothing of them is re-fitted, which MLPs are where `dense` says that there are any."""
    settings = settings_of("qwen3_moe")
    settings.mlp_only_layers = dense
    session = Session(shape=FAMILIES["qwen3_moe"].read_shape(settings.to_dict(), 4))
    assert default_criterion(session, KNOWN, "lstsq", 96, 0.2, units) == name


def test_a_probe_brings_the_gradients_and_plans_go_by_them(workshop, tmp_path):
    model, artifacts = str(workshop.dense("llama-gqa-bias")), tmp_path / "artifacts"
    spp_export.probe(workshop.pools, artifacts, model=model, answer_tokens=4)
    assert all(one.gradients is not None for one in read_artifacts(artifacts).dialogues)

    def planned(**asked):
        asked |= {"model": model, "artifacts": artifacts, "answer_tokens": 4}
        plan = spp_export.plan(workshop.scenario, **asked).plan
        return plan.criterion["name"], plan.budget["realised"]

    by_default, realised = planned(keep=0.75)
    assert by_default == "fisher"
    assert planned(keep=0.75, criterion="fisher") == ("fisher", realised)
    assert planned(keep=0.5)[0] == "obs"
