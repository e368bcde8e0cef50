"""`export`, `convert` and `verify` of GGUF directories, from diagnosis to damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from exporting import CASE, Workshop, refused
from factories import format_options
from gguf_cases import add_merges

import spp_export
from spp_export import GgufOptions
from spp_export.common.errors import CheckpointError, ModelError, ParityError, UsageError
from spp_export.common.manifest import write_manifest
from spp_export.common.progress import quiet_transformers
from spp_export.formats.gguf import llama_cpp

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.gguf",
    "plan.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verify.json",
}
NAME = "llama-gqa-bias"


class Merging(Workshop):
    """The workshop with tokenizers that llama.cpp takes."""

    def dense(self, name: str) -> Path:
        path = self.root / name / "dense"
        return path if path.exists() else add_merges(CASE[name].make(path.parent))

    def gguf(self, target: Path, name: str = NAME, **options: object) -> spp_export.ExportResult:
        """A safetensors export's plan once more, as GGUF."""
        layout = options.pop("layout", "per-layer")
        compensate = options.pop("compensate", "none")
        slim = self.exported(name, layout, compensate)
        form = options.pop("form", GgufOptions())
        return spp_export.export(
            self.scenario,
            target,
            model=str(slim.dense),
            artifacts=self.artifacts(name),
            plan=slim.path / "plan.json",
            **format_options(form),
            **options,
        )


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Merging:
    return Merging(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="module")
def made(merging: Merging, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export, compensated, that nobody changes."""
    target = tmp_path_factory.mktemp("made") / "out"
    merging.gguf(target, compensate="lstsq")
    return target


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def seal(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    write_manifest(directory)


def names(report: dict) -> list[str]:
    return [check["name"] for check in report["checks"]]


def test_the_directory(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FILES
    report = json.loads((made / "verify.json").read_text())
    assert report["passed"]
    assert "metadata, tokenizer and tensors as the plan makes them" in names(report)
    assert "weights as the checkpoint has them" in names(report)
    assert report["gguf"]["architecture"] == "deci"
    assert report["gguf"]["precision"] == "fp32"
    if llama_cpp.is_installed():
        assert names(report)[-1] == "llama.cpp against the oracle"
        assert report["gguf"]["engine"].startswith("xllamacpp 20")
    card = (made / "README.md").read_text()
    assert "library_name: gguf\n" in card
    assert "Architecture `deci`" in card
    assert "llama-cli -m model.gguf" in card


def test_the_file_is_what_gguf_users_expect(made: Path) -> None:
    reader = gguf.GGUFReader(made / "model.gguf")
    plan = json.loads((made / "plan.json").read_text())
    heads = reader.fields["deci.attention.head_count"].contents()
    assert heads == [len(layer["query_heads"]) for layer in plan["layers"]]
    assert reader.fields["general.name"].contents() == "dense (spp)"


def test_verify(made: Path, merging: Merging) -> None:
    report = spp_export.verify(made, model=str(merging.dense(NAME)), scenario=merging.scenario)
    assert report.passed
    found = [check.name for check in report.checks]
    assert found[:3] == [
        "files as the manifest lists them",
        "metadata, tokenizer and tensors as the plan makes them",
        "weights as the plan keeps them",
    ]
    assert found[-1] == "token ids as the source's tokenizer gives them"
    # Weight and bias of o_proj of the two layers that lost heads were re-fitted.
    assert report.checks[2].detail == "47 of 51 tensors"


def test_verify_without_llama_cpp(made: Path, merging: Merging, monkeypatch) -> None:
    monkeypatch.setattr("spp_export.formats.gguf.checks.is_installed", lambda: False)
    report = spp_export.verify(made, model=str(merging.dense(NAME)))
    assert report.passed
    assert "llama.cpp against the oracle" not in [check.name for check in report.checks]
    assert report.to_dict()["gguf"]["engine"] == "none: xllamacpp is not installed"


def test_a_changed_weight_is_found(copy: Path, merging: Merging) -> None:
    path = copy / "model.gguf"
    tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.attn_k.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32(9).tobytes()
    path.write_bytes(bytes(data))
    report = spp_export.verify(copy, model=str(merging.dense(NAME)))
    assert report.failures[0].name == "files as the manifest lists them"
    seal(copy)
    report = spp_export.verify(copy, model=str(merging.dense(NAME)))
    assert "k_proj.weight is not what it was made from" in report.failures[0].detail


def test_a_changed_key_is_found(copy: Path, merging: Merging) -> None:
    path = copy / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"dense (spp)", b"other (spp)"))
    seal(copy)
    report = spp_export.verify(copy, model=str(merging.dense(NAME)))
    assert "'general.name' differs from the plan" in report.failures[0].detail


def test_a_file_cut_short_is_an_error(copy: Path, merging: Merging) -> None:
    path = copy / "model.gguf"
    path.write_bytes(path.read_bytes()[:-64])
    seal(copy)
    with refused(CheckpointError, "damaged or hostile"):
        spp_export.verify(copy, model=str(merging.dense(NAME)))


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (None, "has no spp_gguf"),
        ({"precision": "fp32", "quant": None, "version": 99}, "of version 99"),
        ({"precision": "fp9", "quant": None, "version": 1}, "is malformed"),
        ({"precision": None, "quant": None, "version": 1}, "neither precision nor quant"),
    ],
)
def test_a_config_that_says_something_else(said, match, copy: Path, merging: Merging) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["spp_gguf"] = said
    (copy / "config.json").write_text(json.dumps(config))
    seal(copy)
    with refused(ModelError, match):
        spp_export.verify(copy, model=str(merging.dense(NAME)))


def test_quantised(merging: Merging, tmp_path: Path) -> None:
    result = merging.gguf(tmp_path / "out", form=GgufOptions(quant="q8_0"))
    report = result.to_dict()["verify"]
    assert report["passed"]
    assert report["gguf"]["quant"] == "q8_0"
    if llama_cpp.is_installed():
        assert 0 <= report["quantisation"]["mean_kl"] < 0.1
    # The quality is that of the rounded weights.
    plain = json.loads((merging.exported(NAME).path / "verify.json").read_text())
    assert report["quality"]["slim_perplexity"] != plain["quality"]["slim_perplexity"]
    assert result.to_dict()["gguf"]["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    assert spp_export.verify(tmp_path / "out", model=str(merging.dense(NAME))).passed


def test_what_is_not_quantised_is_said(merging: Merging, tmp_path: Path) -> None:
    """Head counts that are odd make o_proj's rows no multiple of 32."""
    name = "llama-mqa"
    dense = merging.dense(name)
    plan = tmp_path / "plan.json"
    from exporting import write_plan
    from factories import shape_of

    from spp_export.planning import LayerPlan

    write_plan(plan, dense, [LayerPlan((0,), (0, 1, 3), None)] * shape_of(dense).num_layers)
    result = spp_export.export(
        output=tmp_path / "out",
        model=str(dense),
        plan=plan,
        **format_options(GgufOptions(quant="q4_0")),
    )
    left = result.to_dict()["verify"]["gguf"]["not_quantised"]
    assert left == [f"blk.{i}.attn_output.weight" for i in range(3)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not quantised, for their rows are no multiple of 32 values" in card
    assert "blk.0.attn_output.weight" in card


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_other_layouts(layout: str, merging: Merging, tmp_path: Path) -> None:
    result = merging.gguf(tmp_path / "out", "mistral-gqa", layout=layout)
    assert result.report["passed"]
    wanted = {"uniform": "llama", "padded": "deci"}[layout]
    assert result.report["gguf"]["architecture"] == wanted


def test_ragged_layers_are_refused(merging: Merging, tmp_path: Path) -> None:
    slim = merging.exported(NAME, "ragged")
    with refused(UsageError, "--format gguf needs groups of the same size .* --pad"):
        merging.gguf(tmp_path / "out", layout="ragged")
    with refused(ModelError, "needs the same number for every KV head"):
        spp_export.convert(slim.path, tmp_path / "out", **format_options(GgufOptions()))
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_cannot_run_is_refused_before_any_work(
    merging: Merging, tmp_path: Path
) -> None:
    with refused(ModelError, "sliding window"):
        merging.gguf(tmp_path / "out", "mistral-window-tied")
    assert not (tmp_path / "out").exists()


def test_one_format(merging: Merging, tmp_path: Path) -> None:
    """What is for another format is refused, and nothing is made."""
    with refused(UsageError, "--onnx-attention: is for ONNX"):
        merging.gguf(tmp_path / "out", onnx_attention="gqa")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_file_would_hold(merging: Merging, tmp_path: Path) -> None:
    result = merging.gguf(tmp_path / "out", dry_run=True).to_dict()
    assert (result["format"], result["gguf"]["architecture"]) == ("gguf", "deci")
    assert not (tmp_path / "out").exists()


def test_without_the_package(merging: Merging, tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(UsageError, r"GGUF needs the package gguf. Run: .*install .*gguf$"):
        merging.gguf(tmp_path / "out")


def test_convert_of_an_export(made: Path, merging: Merging, tmp_path: Path) -> None:
    """The same file as the export wrote."""
    slim = merging.exported(NAME, "per-layer", "lstsq")
    result = spp_export.convert(slim.path, tmp_path / "out", **format_options(GgufOptions()))
    assert result.to_dict()["format"] == "gguf"
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (made / "model.gguf").read_bytes()
    assert spp_export.verify(tmp_path / "out", model=str(slim.dense)).passed


def test_convert_of_a_dense_model(merging: Merging, tmp_path: Path) -> None:
    dense = merging.dense("qwen3-gqa-tied")
    result = spp_export.convert(dense, tmp_path / "out", **format_options(GgufOptions("fp16")))
    assert result.report["gguf"]["architecture"] == "qwen3"
    assert spp_export.verify(tmp_path / "out", model=str(dense)).passed
    with refused(ModelError, "has GGUF already"):
        spp_export.convert(tmp_path / "out", tmp_path / "again", **format_options(GgufOptions()))


def test_a_failed_check_publishes_nothing(merging: Merging, tmp_path: Path, monkeypatch) -> None:
    from spp_export.formats.gguf import write

    right = write.interleave
    monkeypatch.setattr(write, "interleave", lambda rows, step: right(rows, step)[::-1].copy())
    with refused(ParityError, "weights as the checkpoint has them"):
        merging.gguf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_llama_cpp_disagrees(merging: Merging, tmp_path: Path, monkeypatch) -> None:
    """Weights that are right in a file that says something else of them."""
    pytest.importorskip("xllamacpp")
    from spp_export.formats.gguf import contents

    right = contents.rotary_metadata

    def wrong(decoder, architecture):
        metadata = right(decoder, architecture)
        key = f"{architecture.name}.rope.freq_base"
        return metadata | {key: type(metadata[key])("f32", 123.0)}

    monkeypatch.setattr(contents, "rotary_metadata", wrong)
    with refused(ParityError, "llama.cpp against the oracle: found"):
        merging.gguf(tmp_path / "out")


def test_chat(made: Path, merging: Merging) -> None:
    """The same tokens as transformers, greedily, in one dialogue."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoModelForCausalLM

    chat = spp_export.open_chat(made, threads=1)
    answers = [chat.ask(prompt, max_new_tokens=6) for prompt in ("1+1=", "22 other")]
    assert chat.model.runtime == "llama.cpp"
    slim = merging.exported(NAME, "per-layer", "lstsq").path
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(slim, dtype=torch.float64)
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
        assert wanted[0, ids.shape[1] :].tolist() == list(answer.token_ids)


def test_show(made: Path) -> None:
    shown = spp_export.show(made)
    assert (shown.kind, shown.problems) == ("GGUF export", ())
    assert shown.facts["architecture"] == "deci"
