"""What users meet on an ordinary day, given to every command: never an internal error, always one
line, and advice that is about the fault."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys

import pytest
import torch

from spp_cli.main import run
from spp_export.calibration import cache

pytestmark = pytest.mark.thinned(most=12)

NAME = "qwen2-gqa-tied"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
PRINTED = re.compile(r"error: [^\n]*\n")
# Commands on a model, an export or a text; places in braces.
COMMANDS = {
    "chat": "chat {model} --prompt 1 --max-new-tokens 1",
    "diagnose": "diagnose --scenario {text} --model {model} --artifacts {artifacts}",
    "plan": "plan --scenario {text} --model {model} --artifacts {artifacts}",
    "export": "export --scenario {text} --model {model} --artifacts {artifacts} -o out",
    "export --plan": "export --plan {slim}/plan.json --model {model} -o out --no-verify",
    "convert": "convert {model} --scenario {text} -o out",
    "probe": "probe --model {model} --pools {pools} -o out",
    "verify": "verify {slim} --model {model} --scenario {text}",
    "recover": "recover {slim} --model {model} --data {text} --steps 1 -o out",
    "eval": "eval --scenario {text} --model {model} --artifacts {artifacts} --no-curves -o out",
    "bench": "bench {slim} --model {model} --rounds 1 --context 4 --no-memory",
    "show": "show {model}",
}
READING_TEXT = ("diagnose", "plan", "export", "convert", "verify", "recover", "eval")


@pytest.fixture
def commands(workshop, tmp_path, monkeypatch, capsys):
    """Runs a command at places that may be other ones; its status and its errors."""
    monkeypatch.chdir(tmp_path)
    places = {
        "model": workshop.dense(NAME),
        "slim": workshop.exported(NAME).path,
        "artifacts": workshop.artifacts(NAME),
        "pools": workshop.pools,
        "text": workshop.scenario,
    }

    capsys.readouterr()  # what the making of these places may have said

    def call(line, *more, **other):
        words = [word.format(**{**places, **other}) for word in line.split()]
        status = run([*words, *more, "--quiet"])
        errors = capsys.readouterr().err
        assert "internal error" not in errors, (line, errors)
        assert "SPP_DEBUG" not in errors
        if status == 2:
            assert PRINTED.fullmatch(errors), (line, errors)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return status, errors

    return call


def configured(**changes):
    """A fault of config.json; None takes a key away."""

    def change(model):
        content = json.loads((model / "config.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return change


def only(*kept):
    """A directory of which these files stay."""

    def change(model):
        for path in model.iterdir():
            if path.name not in kept:
                path.unlink()

    return change


def lora(model):
    only("tokenizer.json")(model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / "adapter_model.safetensors").write_bytes(b"")


def pickled(name):
    def change(model):
        for path in model.glob("*.safetensors*"):
            path.unlink()
        (model / name).write_bytes(b"PK")

    return change


def sentencepiece(model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x05")


def emptied(name):
    return lambda model: (model / name).write_bytes(b"")


def replaced(name):
    """A directory in a file's place."""

    def change(model):
        (model / name).unlink()
        (model / name).mkdir()

    return change


def linked(name, target):
    def change(model):
        (model / name).unlink()
        (model / name).symlink_to(target)

    return change


# The fault, and what every command says that reads so far.
MODELS = {
    "a LoRA adapter": (lora, r"is a LoRA adapter .*merge_and_unload"),
    "layers too few": (configured(layer_types=["full_attention"]), "layer_types is of 1 layers"),
    "a layer type unheard of": (
        configured(layer_types=["full_attention", "round", "full_attention"]),
        "`layer_types` entries must be in",
    ),
    "a reward model": (
        configured(architectures=["Qwen2ForTokenClassification"], tie_word_embeddings=False),
        "is a Qwen2ForTokenClassification, which writes no text; expected Qwen2ForCausalLM",
    ),
    "pickles": (pickled("pytorch_model-00001-of-00002.bin"), "pickles are not read. Convert it"),
    "older pickles": (pickled("consolidated.00.pth"), "pickles are not read. Convert it"),
    "no index": (lambda model: (model / INDEX).unlink(), f"neither model.safetensors nor {INDEX}"),
    "a shard that did not come": (lambda model: (model / SHARD).unlink(), "no such file. Fetch"),
    "an empty shard": (emptied(SHARD), "0 bytes are too few for a safetensors file"),
    "an empty config": (emptied("config.json"), "config.json: is empty, expected JSON"),
    "an empty index": (emptied(INDEX), f"{INDEX}: is empty, expected JSON"),
    "an empty tokenizer": (emptied("tokenizer.json"), "tokenizer.json: is empty. Fetch the model"),
    "a folder for a config": (replaced("config.json"), "config.json: expected a regular file"),
    "a folder for a shard": (replaced(SHARD), "expected a regular file"),
    "a loop of links": (linked("config.json", "config.json"), "a loop of links"),
    "a download cut short": (linked(SHARD, "../blobs/0123"), "no such file. Fetch the model again"),
    "nothing but a README": (only(), "config.json: no such file|holds no model|is neither"),
    "an activation unheard of": (configured(hidden_act="wave"), "wave"),
    "rotary settings unheard of": (
        configured(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "spiral",
    ),
    "no epsilon": (configured(rms_norm_eps="small"), "rms_norm_eps"),
    "padding beyond the vocabulary": (configured(pad_token_id=9999), "cannot be loaded: .*adding"),
    "another family": (configured(model_type="mamba"), "model_type 'mamba' is not supported"),
}
# What lies beside these is not the model's own any more, or is not read at all.
OTHERS = "made for the model|plan is for the model"


@pytest.mark.parametrize("fault", MODELS)
def test_models(commands, workshop, tmp_path, fault):
    change, message = MODELS[fault]
    model = tmp_path / "model"
    shutil.copytree(workshop.dense(NAME), model)
    split(model)
    change(model)
    refused = 0
    for name, line in COMMANDS.items():
        status, errors = commands(line, model=model)
        if status:
            assert re.search(f"{message}|{OTHERS}", errors), (name, errors)
            refused += bool(re.search(message, errors))
    assert refused, fault


def split(model):
    """Two shards, as larger models have."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_tokenizer_that_other_packages_read(commands, workshop, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(workshop.dense(NAME), model)
    sentencepiece(model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for name in ("chat", "diagnose", "plan", "export", "convert", "probe", "eval"):
        status, errors = commands(COMMANDS[name], model=model)
        assert status == 2, name
        assert "tokenizer.model needs the package sentencepiece. Run: " in errors, name
        assert "tiktoken" not in errors


@pytest.mark.parametrize("device", ["gpu", "CPU", "meta", "cuda:x", "cuda:-1", "tpu", "mps:1"])
def test_devices_that_do_not_exist(commands, device):
    expected = f"error: --device {device}: expected cpu, cuda, cuda:1, mps, xpu or auto.\n"
    for name, line in COMMANDS.items():
        if name != "show":
            assert commands(line, f"--device={device}") == (2, expected), name


@pytest.mark.parametrize("device", ["cuda", "cuda:2", "mps", "xpu", "xpu:1"])
def test_devices_that_are_not_here(commands, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, line in COMMANDS.items():
        if name in ("show", "convert"):
            continue
        status, errors = commands(line, f"--device={device}")
        assert status == 2, name
        known = f"--device {device}: (PyTorch sees no |expected cpu, cuda or cuda:N)"
        assert re.search(known, errors), (name, errors)


def test_a_card_that_is_not_there(commands, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, errors = commands(COMMANDS["plan"], "--device=cuda:2")
    assert (status, "PyTorch sees 2 here, cuda:0 to cuda:1" in errors) == (2, True)


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("export --plan {slim}/plan.json --model {model} -o out --format onnx", "onnx"),
        ("convert {slim} -o out", "onnx_ir"),
        ("convert {model} -o out", "onnxruntime"),
        ("convert {model} -o out --format gguf", "gguf"),
        (COMMANDS["recover"], "peft"),
    ],
)
def test_packages_that_are_missing(commands, monkeypatch, line, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, errors = commands(line)
    assert status == 2
    assert re.search(rf"needs the package {package}\. Run: .*install ", errors), errors


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("latin.txt", lambda path: path.write_bytes(b"na\xefve"), "is not UTF-8"),
        ("none.txt", lambda path: path.write_bytes(b""), "is empty"),
        ("folder.txt", lambda path: path.mkdir(), "expected a file, got a directory"),
        ("loop.txt", lambda path: path.symlink_to(path), "cannot be read"),
        ("binary.txt", lambda path: path.write_bytes(b"a\0b"), "NUL"),
        ("gone.txt", lambda path: None, "no such file"),
    ],
)
def test_texts(commands, tmp_path, name, make, message):
    make(tmp_path / name)
    for command in READING_TEXT:
        status, errors = commands(COMMANDS[command], text=tmp_path / name)
        assert status == 2, command
        assert message in errors, (command, errors)


@pytest.mark.parametrize("where", ["a file", "below a file", "a loop"])
def test_a_cache_that_cannot_be(commands, tmp_path, monkeypatch, where):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    place = {"a file": "file", "below a file": "file/cache", "a loop": "loop"}[where]
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / place))
    for name in ("plan", "export", "recover"):
        status, errors = commands(COMMANDS[name])
        assert status in (0, 2), name
        if status:
            assert re.search("SPP_CACHE|cannot be written", errors), (name, errors)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("place", ["statistics", "answers"])
def test_a_cache_that_takes_no_more(commands, tmp_path, monkeypatch, place, fault):
    """Nothing half-written stays, and the next run is as if there had been none."""
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    write_at = cache._write_at

    def failing(file, begin, data):
        if begin and f"/{place}/" in str(file.name):
            raise OSError(fault, os.strerror(fault))
        write_at(file, begin, data)

    line = COMMANDS["export"] + " --answer-tokens 4"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write_at", failing)
        status, errors = commands(line)
    assert status == 2
    assert f"/{place}: {place} cannot be kept ({os.strerror(fault)}). " in errors
    assert "set SPP_CACHE to a directory on another disk" in errors
    assert not list((tmp_path / "cache").rglob(".*"))
    assert commands(line)[0] == 0


@pytest.mark.parametrize(
    "problem",
    [
        OSError(28, "No space left on device"),
        ConnectionError("Connection aborted.\n\nRemote end closed"),
        PermissionError(13, "Permission denied", "/cache"),
        KeyError("x-repo-commit"),
        ValueError(""),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_downloads_that_fail(commands, monkeypatch, problem):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    status, errors = commands(COMMANDS["plan"], model="org/name")
    assert status == 2
    assert "org/name: not a directory here, and the hub did not give it: " in errors
