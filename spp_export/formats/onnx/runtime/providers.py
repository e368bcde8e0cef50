"""Sessions of ONNX Runtime on the device that was asked for, or a refusal; never on another one."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from spp_export.common.errors import CheckpointError, SppError, UsageError
from spp_export.common.installation import install_command
from spp_export.formats.onnx.options import require

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DEVICE = re.compile(r"(cpu)|cuda(?::(\d{1,4}))?")
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_MEMORY = re.compile(r"out of memory|allocate memory|bad allocation|bad_alloc", re.IGNORECASE)
_CUDA_FAILURE = re.compile(r"cuda|cudnn|cublas", re.IGNORECASE)
_FATAL = 4
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_MAX_REASON = 300


def cuda_index(device: str) -> int | None:
    """The card that "cuda" or "cuda:N" names; None for "cpu". UsageError for anything else."""
    match = _DEVICE.fullmatch(device)
    if not match:
        raise UsageError(f"--device {device:.40}: expected cpu, cuda or cuda:N for an ONNX model.")
    return None if match[1] else int(match[2] or 0)


def session(
    path: Path, device: str = "cpu", threads: int | None = None, graph: bytes | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of a graph on `device`; `graph` is what to read in place of
    the file `path`, whose weights it takes.

    On CUDA, nodes without a kernel there run on the CPU. `threads` is of one operator on the CPU;
    None leaves it to ONNX Runtime, which takes one per core.

    Raises UsageError where ONNX Runtime or what `device` needs is missing, CheckpointError where
    the graph or its weights cannot be read.
    """
    card = cuda_index(device)
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}: expected 1 or more.")
    runtime = require("onnxruntime")
    # What its log would say of a failure is in the exception too.
    runtime.set_default_logger_severity(_FATAL)
    providers: list[Any] = [CPU]
    if card is not None:
        _find_cuda(runtime)
        # Rounding fp32 products to TF32 would look like a fault of the export.
        providers.insert(0, (CUDA, {"device_id": card, "use_tf32": 0}))
    with runtime_errors(str(path), device):
        # Without enable_fallback=0 it prints, and tries again on the CPU.
        options = _options(runtime, threads)
        if graph is not None:
            options.add_session_config_entry(_DATA_FOLDER, str(path.parent))
        made = runtime.InferenceSession(
            path if graph is None else graph, options, providers=providers, enable_fallback=0
        )
    if card is not None and CUDA not in made.get_providers():
        raise _no_cuda(str(path), "its driver or libraries did not load")
    return made


@contextlib.contextmanager
def runtime_errors(what: str, device: str) -> Iterator[None]:
    """ONNX Runtime's exceptions as ours, in one line that starts with `what`."""
    try:
        yield
    except Exception as error:
        own = type(error).__module__.startswith("onnxruntime")
        if not own and not isinstance(error, (RuntimeError, ValueError, MemoryError)):
            raise
        raise _translated(what, device, error) from error


def _translated(what: str, device: str, error: Exception) -> SppError:
    reason = _PREFIX.sub("", " ".join(str(error).split()) or type(error).__name__)
    reason = reason[:_MAX_REASON].rstrip(".")
    if isinstance(error, MemoryError) or _MEMORY.search(reason):
        return UsageError(
            f"{what}: not enough memory on {device}: {reason}. Use fewer rows or shorter texts."
        )
    if device != "cpu" and _CUDA_FAILURE.search(reason):
        return _no_cuda(what, reason)
    return CheckpointError(f"{what}: ONNX Runtime cannot run it: {reason}. Export it again.")


def _options(runtime: ModuleType, threads: int | None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1  # a decoder is a chain
    # It keeps a plan of the memory per shape of the inputs, and every step of decoding has its own.
    options.enable_mem_pattern = False
    return options


def _find_cuda(runtime: ModuleType) -> None:
    if CUDA not in runtime.get_available_providers():
        raise UsageError(
            "--device cuda: the installed onnxruntime has no CUDA provider. Uninstall onnxruntime "
            "and onnxruntime-gpu, which must not both be installed, then run: "
            f"{install_command('onnx-gpu')}"
        )
    if preload := getattr(runtime, "preload_dlls", None):
        # It prints what it does not find, which the session then misses.
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _no_cuda(what: str, reason: str) -> UsageError:
    return UsageError(
        f"{what}: CUDA cannot be used: {reason}. See nvidia-smi for the driver, run "
        f"{install_command('onnx-gpu')} for the libraries, or use --device cpu."
    )
