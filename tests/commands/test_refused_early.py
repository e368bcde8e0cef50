"""What cannot succeed is refused before any work is done for it, in a dry run as without."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from exporting import CASE, refused
from factories import make_checkpoint, read_config

import spp_export
from spp_cli.render.look import UNICODE
from spp_cli.render.summary import export_summary
from spp_export.common.errors import ModelError, UsageError
from spp_export.common.progress import show_progress

MODES = ({}, {"dry_run": True}, {"verify": False})


@contextmanager
def nothing_begun():
    """No stage of work is reported."""
    begun = []

    @contextmanager
    def listen(description, total):
        begun.append(description)
        yield lambda done: None

    with show_progress(listen):
        yield
    assert begun == []


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
        ("qwen3-gqa-untied", {}, "no Qwen3 with layers that differ and an output matrix"),
        ("qwen3-gqa-untied", {"units": "channels"}, "no Qwen3 with layers that differ"),
        ("qwen3-gqa-tied", {"compensate": "bias"}, "llama.cpp's Qwen3 has no biases"),
        ("llama-gqa-bias", {}, "this tokenizer merges nothing"),
    ],
)
def test_a_file_that_llama_cpp_would_not_take(workshop, tmp_path, name, asked, match, mode):
    """Whatever the plan will be."""
    if name == "qwen3-gqa-untied":
        model = CASE["qwen3-gqa-tied"].make(tmp_path, tied=False)
        artifacts = tmp_path / "artifacts"
        spp_export.probe(workshop.pools, artifacts, model=str(model))
    else:
        model, artifacts = workshop.dense(name), workshop.artifacts(name)
    request = {"model": str(model), "artifacts": artifacts, "format": "gguf", **asked, **mode}
    with nothing_begun(), refused(ModelError, match):
        spp_export.export(workshop.scenario, tmp_path / "x", **request)
    assert not (tmp_path / "x").exists()
