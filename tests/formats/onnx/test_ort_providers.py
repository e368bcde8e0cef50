"""A session on the device that was asked for, or one line that says why not; silent otherwise."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from exported_onnx import WINDOWED, onnx_directory, pair, random_ids

from spp_export.common.errors import CheckpointError, UsageError
from spp_export.formats.onnx.options import ATTENTIONS, Attention, Precision
from spp_export.formats.onnx.runtime import OrtModel, session
from spp_export.formats.onnx.runtime.providers import CPU, CUDA, cuda_index, runtime_errors

HAS_CARD = CUDA in onnxruntime.get_available_providers()


class _Session:
    """What a session of ONNX Runtime says of itself where CUDA did not come up."""

    def __init__(self, path: Path, options: Any, *, providers: list[Any], enable_fallback: int):
        assert [p if isinstance(p, str) else p[0] for p in providers] == [CUDA, CPU]
        assert not enable_fallback

    def get_providers(self) -> list[str]:
        return [CPU]


@pytest.fixture
def cuda_wheel(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """ONNX Runtime as if its wheel were the one for CUDA, and its libraries missing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so"), raising=False
    )
    return monkeypatch


@pytest.fixture
def graph() -> Path:
    return onnx_directory(WINDOWED, "gqa") / "model.onnx"


def test_the_cpu_is_the_default(graph: Path) -> None:
    made = session(graph, threads=1)
    assert made.get_providers() == [CPU]
    options = made.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


@pytest.mark.parametrize(
    ("device", "card"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)]
)
def test_devices(device: str, card: int | None) -> None:
    assert cuda_index(device) == card


@pytest.mark.parametrize(
    "device", ["", "mps", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU", "auto"]
)
def test_other_devices_are_refused(graph: Path, device: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        session(graph, device)


def test_threads_must_be_some(graph: Path) -> None:
    with pytest.raises(UsageError, match="threads 0"):
        session(graph, threads=0)


def test_without_the_package(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"install .*\[onnx\]"):
        session(graph)


def test_without_a_cuda_provider(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(UsageError, match=r"install .*\[onnx-gpu\]") as caught:
        session(graph, "cuda")
    assert "must not both be installed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_falling_back_to_the_cpu_is_refused(
    graph: Path, cuda_wheel: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cuda_wheel.setattr(onnxruntime, "InferenceSession", _Session)
    with pytest.raises(UsageError, match=r"CUDA cannot be used.*nvidia-smi"):
        session(graph, "cuda:1")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        ("CUDA failure 100: no CUDA-capable\n device is detected", UsageError, "nvidia-smi"),
        ("Failed to allocate memory for requested buffer", UsageError, "not enough memory"),
        ("Could not find an implementation for X(1)", CheckpointError, "Export it again"),
    ],
)
def test_failures_on_the_card(
    graph: Path,
    cuda_wheel: pytest.MonkeyPatch,
    message: str,
    error: type[Exception],
    match: str,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {message}")

    cuda_wheel.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(error, match=match) as caught:
        session(graph, "cuda")
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)


def test_errors_of_our_own_are_not_translated() -> None:
    with pytest.raises(KeyError), runtime_errors("x", "cpu"):
        raise KeyError("a bug")
    with pytest.raises(UsageError, match="as it was"), runtime_errors("x", "cpu"):
        raise UsageError("as it was")


@pytest.mark.parametrize("form", ["gqa", "gqa-bias"])
def test_fp32_group_query_attention_is_refused_on_cuda(form: Attention) -> None:
    with pytest.raises(UsageError, match=r"--precision fp16.*--onnx-attention standard"):
        OrtModel.load(onnx_directory(WINDOWED, form), device="cuda")


def test_bf16_is_refused_on_the_cpu() -> None:
    with pytest.raises(UsageError, match="no bf16 kernels on the CPU"):
        OrtModel.load(onnx_directory(WINDOWED, "gqa", "bf16"))


def test_bf16_that_is_not_announced_is_refused_too(tmp_path: Path) -> None:
    target = _copy(tmp_path, "bf16")
    config = json.loads((target / "config.json").read_text())
    config["spp_onnx"]["precision"] = "fp32"
    (target / "config.json").write_text(json.dumps(config))
    _refused(target)


@pytest.mark.parametrize("content", [b"", b"garbage" * 99])
def test_damaged_graphs(tmp_path: Path, content: bytes) -> None:
    target = _copy(tmp_path)
    (target / "model.onnx").write_bytes(content)
    _refused(target)


@pytest.mark.parametrize("part", ["model.onnx", "model.onnx_data"])
def test_missing_and_truncated_files(tmp_path: Path, part: str) -> None:
    target = _copy(tmp_path)
    os.truncate(target / part, (target / part).stat().st_size // 2)
    _refused(target)
    (target / part).unlink()
    _refused(target)


def test_a_failing_run_is_one_line_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """Padding on the left, past the runner's own check: the graph's guard ends it."""
    both = pair(WINDOWED, "gqa")
    decoding = both.model.start(1, 4)
    feeds = {"input_ids": np.array([[5]]), "attention_mask": np.array([[0, 1, 1]])}
    with pytest.raises(CheckpointError, match="left_padding_needs_gqa_bias") as caught:
        decoding._run(feeds)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    ids = random_ids(1, 4)
    np.testing.assert_array_equal(decoding.feed(ids), both.model.logits(ids))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CARD, reason="needs onnxruntime-gpu and a CUDA card")
@pytest.mark.parametrize(
    ("form", "precision"),
    [(form, precision) for form in ATTENTIONS for precision in ("fp16", "bf16")]
    + [("standard", "fp32")],
)
def test_the_card_gives_what_the_cpu_gives(form: Attention, precision: Precision) -> None:
    exact = pair(WINDOWED, form).model
    model = OrtModel.load(onnx_directory(WINDOWED, form, precision), device="cuda")
    ids, mask = random_ids(2, 9), np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    bound = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}[precision]
    decodings = [each.start(2, 20) for each in (exact, model)]
    expected, found = (decoding.feed(ids, mask)[mask == 1] for decoding in decodings)
    for step in range(9):
        assert abs(found - expected).max() < bound * abs(expected).max()
        new = random_ids(2, 1, seed=step)
        expected, found = (decoding.feed(new) for decoding in decodings)


def _copy(tmp_path: Path, precision: Precision = "fp32") -> Path:
    target = tmp_path / "copy"
    shutil.copytree(onnx_directory(WINDOWED, "gqa", precision), target)
    return target


def _refused(directory: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        OrtModel.load(directory, threads=1)
    message = str(caught.value)
    assert message.startswith(str(directory / "model.onnx"))
    assert "\n" not in message
