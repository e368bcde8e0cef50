"""What cannot succeed is refused before any work is done for it, in a dry run as without."""

from __future__ import annotations

import pytest
from exporting import nothing_begun, refused, stages
from factories import make_checkpoint, read_config

import spp_export
from spp_cli.render.look import UNICODE
from spp_cli.render.summary import export_summary
from spp_export.common.errors import BudgetError, ModelError, PlanError, UsageError

pytestmark = pytest.mark.thinned(most=8)

MODES = ({}, {"dry_run": True}, {"verify": False})


@pytest.fixture(scope="module")
def narrow(workshop, tmp_path_factory):
    """Models by their head_dim, with artifacts."""
    made = {}

    def of(head_dim):
        if head_dim not in made:
            root = tmp_path_factory.mktemp(f"narrow{head_dim}")
            sizes = {"kv_heads": 2, "query_heads": 4, "layers": 2, "head_dim": head_dim}
            dense = make_checkpoint(root, "llama", **sizes)
            spp_export.probe(workshop.pools, root / "artifacts", model=str(dense))
            made[head_dim] = {"model": str(dense), "artifacts": root / "artifacts"}
        return made[head_dim]

    return of


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "form", "multiple"), [(20, "standard", 16), (40, "gqa-bias", 16)]
)
def test_attention_is_one_that_takes_the_heads(
    workshop, tmp_path, narrow, head_dim, form, multiple, mode
):
    made, target = narrow(head_dim), tmp_path / "graph"
    result = spp_export.export(workshop.scenario, target, format="onnx", **made, **mode)
    assert result.form["attention"] == form
    assert target.exists() != ("dry_run" in mode)
    if result.path:
        assert read_config(target)["spp_onnx"]["attention"] == form
        assert spp_export.verify(target, model=made["model"]).passed
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(export_summary(result, UNICODE, 0))
    reason = f"attention {form}: gqa takes head_dim in multiples of {multiple}, and this model has"
    assert f"{reason} {head_dim}" in captured.get()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "form", "others"),
    [(20, "gqa", "standard"), (20, "gqa-bias", "standard"), (40, "gqa", "gqa-bias or standard")],
)
def test_an_attention_that_does_not_is_refused(
    workshop, tmp_path, narrow, head_dim, form, others, mode
):
    made = narrow(head_dim)
    asked = {"format": "onnx", "onnx_attention": form}
    with (
        nothing_begun(),
        refused(UsageError, f"multiples .*has {head_dim}. Use {others}, or leave"),
    ):
        spp_export.export(workshop.scenario, tmp_path / "x", **asked, **made, **mode)
    if "dry_run" not in mode:
        with nothing_begun(), refused(UsageError, f"--onnx-attention {form}: takes head_dim in"):
            spp_export.convert(made["model"], tmp_path / "x", **asked, **mode)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("name", "asked", "match"),
    [
        ("mistral-window-tied", {}, r"sees the last 6 tokens only \(sliding window\)"),
        ("qwen3-gqa-tied", {"compensate": "bias"}, "openelm has no biases of output"),
        ("llama-gqa-bias", {}, "this tokenizer merges nothing"),
    ],
)
def test_a_file_that_llama_cpp_would_not_take(workshop, tmp_path, name, asked, match, mode):
    """Whatever the plan will be."""
    model, artifacts = workshop.dense(name), workshop.artifacts(name)
    request = {"model": str(model), "artifacts": artifacts, "format": "gguf", **asked, **mode}
    with nothing_begun(), refused(ModelError, match):
        spp_export.export(workshop.scenario, tmp_path / "x", **request)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["plan", "export", "dry run"])
@pytest.mark.parametrize(
    ("name", "asked", "error", "match"),
    [
        ("llama-gqa-bias", {"max_kv_bytes": 30}, BudgetError, "Ask for max_kv_bytes 128 or more"),
        ("llama-gqa-bias", {"max_params": 999}, BudgetError, r"Ask for max_params \d+ or more"),
        ("llama-mqa", {"keep": 0.01}, BudgetError, r"Ask for keep 0\.\d+ or more"),
        ("llama-mqa", {"keep": 0.01, "layout": "ragged"}, BudgetError, "Ask for keep"),
        ("llama-mqa", {"keep": 0.3, "allow_empty_layers": False}, BudgetError, "Ask for keep"),
        ("mistral-gqa", {"keep": 0.1, "layout": "uniform"}, BudgetError, "smallest uniform plan"),
        ("mistral-gqa", {"keep": 0.1, "cost": "kv-bytes"}, BudgetError, "bytes of KV cache"),
        (
            "mistral-gqa",
            {"keep": 0.5, "units": "channels", "allow_empty_layers": False},
            BudgetError,
            "64 channels per layer",
        ),
        ("mistral-gqa", {"keep": 0.01, "units": "both"}, BudgetError, "Ask for keep"),
        (
            "mistral-gqa",
            {"allow_empty_layers": True, "layout": "uniform"},
            PlanError,
            "--allow-empty-layers: a stock config cannot say",
        ),
        ("mistral-gqa", {"tp": 5}, PlanError, "divide among 5 cards|divides among 5 cards"),
        ("mistral-gqa", {"policy": "published"}, UsageError, "takes its own budget"),
        (
            "mistral-gqa",
            {"policy": "published", "strength": 0.5},
            UsageError,
            "needs imported artifacts",
        ),
        ("mistral-gqa", {"regime": "nowhere"}, UsageError, "regime 'nowhere' is not in these"),
        (
            "mistral-gqa",
            {"criterion": "taylor", "layerwise": True},
            UsageError,
            "--criterion taylor: needs every weight in memory",
        ),
    ],
)
def test_plans_that_cannot_be_are_known_from_shapes(
    workshop, tmp_path, command, name, asked, error, match
):
    request = {"model": str(workshop.dense(name)), "artifacts": workshop.artifacts(name), **asked}
    with nothing_begun(), refused(error, match):
        if command == "plan":
            spp_export.plan(workshop.scenario, tmp_path / "x", **request)
        else:
            request["dry_run"] = command == "dry run"
            spp_export.export(workshop.scenario, tmp_path / "x", **request)
    assert not (tmp_path / "x").exists()


def test_a_strength_needs_the_diagnosis_and_no_more(workshop, tmp_path):
    """What share stays depends on the text, so that much is read."""
    begun = []
    asked = {
        "model": str(workshop.dense("llama-mqa")),
        "artifacts": workshop.artifacts("llama-mqa"),
    }
    with stages(begun), refused(BudgetError, "budget strength 1.0 .* Lower the strength"):
        spp_export.plan(workshop.scenario, strength=1.0, allow_empty_layers=False, **asked)
    assert set(begun) <= {"loading the dense model", "diagnosing the scenario"}
