"""Models that can be timed, whoever runs them: one protocol, and the way to open each."""

from __future__ import annotations

from spp_bench.candidates import Candidate
from spp_bench.engines.runner import Runner


def open_runner(candidate: Candidate, device: str, threads: int) -> Runner:
    """Load a candidate; `threads` is per operator, for engines that take it per session."""
    if candidate.made:
        from spp_bench.engines.static import StaticRunner

        return StaticRunner.load(candidate, device)
    if candidate.engine == "torch":
        from spp_bench.engines.torch import TorchRunner

        return TorchRunner.load(candidate, device)
    if candidate.engine == "onnx":
        from spp_bench.engines.ort import OrtRunner

        return OrtRunner.load(candidate, device, threads)
    if candidate.engine == "gguf":
        from spp_bench.engines.gguf import LlamaRunner

        return LlamaRunner(candidate, threads)
    from spp_bench.engines.genai import GenaiRunner

    return GenaiRunner.load(candidate, device, threads)


def genai_installed() -> bool:
    """Whether onnxruntime-genai can be imported."""
    from importlib.util import find_spec

    return find_spec("onnxruntime_genai") is not None
