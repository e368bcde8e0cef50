"""Directories that transformers would follow out of themselves, given to every command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from exporting import load, stored, tokens, write_plan, write_pools
from factories import make_checkpoint, random_layers, shape_of, write_slim
from safetensors.torch import save_file

from spp_cli.main import run
from spp_export.common.errors import CheckpointError, SppError
from spp_export.common.manifest import write_manifest
from spp_export.models.layerwise import open_layerwise
from spp_export.models.loader import load_dense, load_slim

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OUTSIDE = "outside.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A dense model, a plan for it, the export of that plan, and a scenario."""
    root = tmp_path_factory.mktemp("hostile")
    dense = make_checkpoint(root, "llama", kv_heads=2, query_heads=4, layers=2)
    layers = random_layers(shape_of(dense), 3)
    plan = write_plan(root / "plan.json", dense, layers)
    slim = write_slim(root / "slim", dense, layers)
    shutil.copyfile(plan, slim / "plan.json")
    write_manifest(slim)
    write_pools(root / "pools")
    (root / "s.txt").write_text("What is 2+2?\n\nAnd 3+3?")
    return root


@pytest.fixture
def place(origin, tmp_path, monkeypatch):
    """A copy of all that to work in."""
    shutil.copytree(origin, tmp_path / "w", symlinks=True)
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "w"


def with_index(directory: Path, outside: str, tensors: dict[str, torch.Tensor] | None = None):
    """Split off the head to the file that `outside` names, as an index may say."""
    tensors = tensors or stored(directory)
    (directory / WEIGHTS).unlink()
    inside = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    save_file(inside, directory / "model-00001-of-00002.safetensors", {"format": "pt"})
    target = Path(os.path.normpath(directory / outside))
    save_file({HEAD: tensors[HEAD]}, target, {"format": "pt"})
    weight_map = dict.fromkeys(inside, "model-00001-of-00002.safetensors") | {HEAD: outside}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content))


def refuses(capsys, *arguments: str, match: str) -> None:
    """Exit 2, one line with `match` on stderr, and nothing written."""
    before = set(os.listdir("."))
    capsys.readouterr()
    assert run([*arguments, "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert match in lines[0]
    assert set(os.listdir(".")) == before
    assert not os.path.lexists("out")


DENSE = ("--model", "dense")
DENSE_COMMANDS = {
    "export": ("export", "--plan", "plan.json", "-o", "out", *DENSE),
    "export without checks": ("export", "--plan", "plan.json", "-o", "out", "--no-verify", *DENSE),
    "export to ONNX": ("export", "--plan", "plan.json", "-o", "out", "--format", "onnx", *DENSE),
    "dry run": ("export", "--plan", "plan.json", "-o", "out", "--dry-run", *DENSE),
    "plan": ("plan", "--scenario", "s.txt", "--artifacts", "none", "-o", "out", *DENSE),
    "diagnose": ("diagnose", "--scenario", "s.txt", "--artifacts", "none", *DENSE),
    "verify against it": ("verify", "slim", *DENSE),
    "convert": ("convert", "dense", "-o", "out"),
    "chat": ("chat", "dense", "--prompt", "x"),
    "show": ("show", "dense"),
    "bench": ("bench", "slim", *DENSE),
    "probe": ("probe", "--pools", "pools", "-o", "out", *DENSE),
}
SLIM_COMMANDS = {
    "verify": ("verify", "slim", *DENSE),
    "convert": ("convert", "slim", "-o", "out"),
    "chat": ("chat", "slim", "--prompt", "x"),
    "bench": ("bench", "slim", *DENSE),
}
# How an index can name the file behind the directory `w/<model>`.
ESCAPES = {
    "parent": f"../{OUTSIDE}",
    "through itself": f"../dense/../{OUTSIDE}",
    "absolute": "/{root}/" + OUTSIDE,
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_transformers_follows_what_every_command_refuses(place, capsys, escape):
    """The point of our own check: no library that we call stops at the directory's edge."""
    name = ESCAPES[escape].format(root=str(place).lstrip("/"))
    before = load(place / "dense")(tokens()).logits
    with_index(place / "dense", name)
    assert (place / OUTSIDE).is_file()
    torch.testing.assert_close(load(place / "dense")(tokens()).logits, before, rtol=0, atol=0)
    for arguments in DENSE_COMMANDS.values():
        refuses(capsys, *arguments, match="not a plain file name")


def test_it_follows_the_index_of_an_export_too(place, capsys):
    with_index(place / "slim", f"../{OUTSIDE}")
    load_by_transformers = load(place / "slim")
    assert load_by_transformers.lm_head.weight.isfinite().all()
    (place / "slim" / "manifest.json").unlink()
    write_manifest(place / "slim")
    for arguments in SLIM_COMMANDS.values():
        refuses(capsys, *arguments, match="not a plain file name")


@pytest.mark.parametrize("model", ["dense", "slim"])
@pytest.mark.parametrize(
    "opened", [load_slim, load_dense, open_layerwise], ids=lambda f: f.__name__
)
def test_the_library_refuses_it_as_the_commands_do(place, model, opened):
    with_index(place / model, f"../{OUTSIDE}")
    options = {"dtype": torch.float32}
    with pytest.raises(SppError) as caught:
        opened(place / model, **options)
    assert "\n" not in str(caught.value)
    if (model, opened) != ("slim", load_dense):  # whose layers differ, which is said first
        assert isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("model", ["dense", "slim"])
def test_a_link_out_of_the_directory(place, capsys, model):
    directory = place / model
    (directory / WEIGHTS).rename(place / OUTSIDE)
    (directory / WEIGHTS).symlink_to(f"../{OUTSIDE}")
    load(directory)
    with pytest.raises(CheckpointError, match="leads out of the model's directory"):
        load_slim(directory)
    if model == "dense":
        for arguments in DENSE_COMMANDS.values():
            refuses(capsys, *arguments, match="leads out of the model's directory")


@pytest.mark.parametrize(
    "name", ["C:model.safetensors", "C:\\model.safetensors", "a\0.safetensors", "a\nb.safetensors"]
)
def test_names_that_mean_something_elsewhere(place, capsys, name):
    with_index(place / "dense", "inside.safetensors")
    index = json.loads((place / "dense" / INDEX).read_text())
    index["weight_map"][HEAD] = name
    (place / "dense" / INDEX).write_text(json.dumps(index))
    refuses(capsys, *DENSE_COMMANDS["export"], match="not a plain file name")
    refuses(capsys, *DENSE_COMMANDS["chat"], match="not a plain file name")


def test_a_file_that_other_readers_would_take_for_a_pickle(place, capsys):
    with_index(place / "dense", "inside.bin")
    for command in ("export", "chat", "convert"):
        refuses(capsys, *DENSE_COMMANDS[command], match="ends in .safetensors")


# What a file of a model can be instead of a file.
def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", [_pipe, _device, _folder, _loop], ids=lambda f: f.__name__)
def test_what_is_no_file_is_neither_waited_for_nor_read(place, capsys, kind, name):
    (place / "dense" / name).unlink()
    kind(place / "dense" / name)
    # A pipe that is waited for, or a device that is read, would never end.
    for command in ("export", "chat", "convert"):
        refuses(capsys, *DENSE_COMMANDS[command], match="dense")


COMPANIONS = {
    "generation_config.json": b"{}",
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"text",
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_travels_is_not_fetched_from_elsewhere(place, capsys, name):
    path = place / "dense" / name
    content = COMPANIONS[name]
    if content is None:
        path.rename(place / "secret")
    else:
        path.unlink(missing_ok=True)
        (place / "secret").write_bytes(content)
    path.symlink_to("../secret")
    refuses(capsys, *DENSE_COMMANDS["export without checks"], match="leads out of the model's")
    refuses(capsys, *DENSE_COMMANDS["convert"], match="leads out of the model's")
    path.unlink()
    path.symlink_to("../nothing")
    refuses(capsys, *DENSE_COMMANDS["export without checks"], match="no such file")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "LICENSE"])
def test_what_travels_has_a_sane_size(place, capsys, name):
    with (place / "dense" / name).open("wb") as file:
        file.truncate(1 << 40)
    refuses(capsys, *DENSE_COMMANDS["export without checks"], match="at most 67108864 are read")


# Files beside the weights that transformers' own readers do not survive, or follow.
TOKENIZERS = {
    "deep settings": ("tokenizer_config.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "deeper"),
    "settings are a list": ("tokenizer_config.json", b"[]", "expected a JSON object"),
    "settings not finite": ("tokenizer_config.json", b'{"a": NaN}', "NaN is not a finite number"),
    "deep map": ("special_tokens_map.json", b'{"a":' * 10**5, "deeper"),
    "another file": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "PreTrainedTokenizerFast", "tokenizer_file": "/etc/passwd"}',
        "names a file in 'tokenizer_file'",
    ),
    "code of its own": (
        "tokenizer_config.json",
        b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "T"}',
        "",
    ),
    "deep tokenizer": ("tokenizer.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "no tokenizer"),
    "empty tokenizer": ("tokenizer.json", b"{}", "no tokenizer"),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe", "no tokenizer"),
    "generation settings": ("generation_config.json", b"[1]", "expected a JSON object"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers(place, capsys, kind):
    name, content, match = TOKENIZERS[kind]
    (place / "dense" / name).write_bytes(content)
    (place / "dense" / "evil.py").write_text("raise SystemExit('code ran')")
    if kind == "code of its own":  # which is left aside where tokenizer.json needs none
        assert run(["chat", "dense", "--prompt", "x", "--max-new-tokens", "1", "--quiet"]) == 0
        return
    refuses(capsys, *DENSE_COMMANDS["chat"], match=match)


def test_a_card_that_never_ends_is_passed_over(place):
    os.mkfifo(place / "dense" / "README.md")
    assert run([*DENSE_COMMANDS["export without checks"], "--quiet"]) == 0


def test_templates_in_a_folder_are_no_way_out(place, capsys):
    folder = place / "dense" / "additional_chat_templates"
    folder.mkdir()
    (place / "secret").write_text("x")
    (folder / "tool.jinja").symlink_to("../../secret")
    refuses(capsys, *DENSE_COMMANDS["chat"], match="leads out of the model's directory")
    shutil.rmtree(folder)
    folder.symlink_to("..")
    refuses(capsys, *DENSE_COMMANDS["chat"], match="expected a directory")


# Keys and files by which a config makes transformers load something else than what was checked.
ELSEWHERE = {
    "other weights": ({"transformers_weights": "other.safetensors"}, "names other weights"),
    "kernels": ({"_attn_implementation": "org/kernels:fast"}, "names code to fetch"),
    "kernels, new key": ({"attn_implementation": "org/kernels"}, "names code to fetch"),
    "kernels by part": ({"attn_implementation": {"": "org/kernels"}}, "names code to fetch"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
}


@pytest.mark.parametrize("model", ["dense", "slim"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_configs_that_lead_elsewhere(place, capsys, kind, model):
    changes, match = ELSEWHERE[kind]
    path = place / model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuses(capsys, "chat", model, "--prompt", "x", match=match)
    with pytest.raises(SppError, match=match):
        load_slim(place / model)
    if model == "dense":
        refuses(capsys, *DENSE_COMMANDS["export"], match=match)


@pytest.mark.parametrize("model", ["dense", "slim"])
def test_an_adapter_is_not_put_on_top(place, capsys, model):
    (place / model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/evil"}')
    refuses(capsys, "chat", model, "--prompt", "x", match="adapter_config.json")
    if model == "dense":  # of an export the manifest speaks first
        refuses(capsys, *DENSE_COMMANDS["convert"], match="adapter_config.json")
        refuses(capsys, *DENSE_COMMANDS["export"], match="adapter_config.json")


def test_the_cache_of_the_hub_still_works(place):
    """Its own links are the one kind that is followed."""
    snapshot = place / "models--org--name" / "snapshots" / "0123"
    blobs = place / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((place / "dense").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (place / "dense").rmdir()
    arguments = ["export", "--plan", "plan.json", "-o", "out", "--quiet"]
    assert run([*arguments, "--model", str(snapshot)]) == 0
    assert run(["chat", str(snapshot), "--prompt", "x", "--max-new-tokens", "1", "--quiet"]) == 0
