"""Nothing is unpickled but a published probe, and that without running what is in it."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spp_cli.main import run

ROOT = Path(__file__).parents[2]
PACKAGES = ("spp_export", "cli/spp_cli", "kernels/spp_kernels", "benchmarks")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
IMPORTER = "spp_export/data/published_artifacts.py"
# Benchmarks: a job for a child process over its own pipe, and a peer's file just written by it.
OWN_MAKING = {
    "benchmarks/spp_bench/processes.py": {"import pickle"},
    "benchmarks/spp_campaigns/peers/check.py": {"torch.load(weights_only=False)"},
}


def risky(tree: ast.AST) -> Iterator[str]:
    """What could unpickle or run text, as it would be written."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {n.name}" for n in names if n.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield f"import {module}"
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"torch.load(weights_only={given.get('weights_only')})"
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                yield "allow_pickle"
            case ast.keyword(arg="trust_remote_code", value=value):
                if ast.unparse(value) != "False":
                    yield "trust_remote_code"
            case ast.keyword(arg="shell", value=value) if ast.unparse(value) != "False":
                yield "shell"


def test_the_search_finds_what_it_looks_for():
    code = "import pickle\nfrom dill import x\nnp.load(f, allow_pickle=True)\ntorch.load(f)\n"
    code += "eval('1')\nf(trust_remote_code=None)\nrun(c, shell=True)\n"
    assert set(risky(ast.parse(code))) == {
        "import pickle",
        "import dill",
        "allow_pickle",
        "torch.load(weights_only=None)",
        "eval",
        "trust_remote_code",
        "shell",
    }


def test_no_source_unpickles_but_the_import_of_artifacts():
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if calls := set(risky(ast.parse(path.read_text(encoding="utf-8")))):
                found[path.relative_to(ROOT).as_posix()] = calls
    own = {path: calls for path, calls in found.items() if path in OWN_MAKING}
    assert own.keys() <= OWN_MAKING.keys()
    peers = own.pop("benchmarks/spp_campaigns/peers/check.py", set())
    assert peers <= {"torch.load(weights_only=False)", "trust_remote_code"}
    for path, calls in own.items():
        assert calls <= OWN_MAKING[path], path
    rest = {path: calls for path, calls in found.items() if path not in OWN_MAKING}
    assert rest == {IMPORTER: {"torch.load(weights_only=True)"}}


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def published(root: Path, count: int = 2, heads: int = 2, width: int = 4) -> Path:
    """A published directory of one layer, as its scripts write it."""
    probes = root / "probe1_base.pt"
    probes.mkdir(parents=True)
    scores = {"num_layers": 1, "num_heads_per_layer": heads, "num_domains": count}
    scores["importance"] = {"0": [[0.5] * count] * heads}
    (root / "head_importance.pt").write_text(json.dumps(scores))
    metadata = {"layer_indices": [0], "num_layers": 1, "num_domains": count}
    (probes / "metadata.json").write_text(json.dumps(metadata))
    (root / "whitelist.json").write_text("[[0, 0]]")
    (root / "probe_temperatures.json").write_text("{}")
    state = {
        "classifier.weight": torch.zeros(count, width),
        "classifier.bias": torch.zeros(count),
    }
    torch.save({"state_dict": state}, probes / "probe_layer_0.pt")
    return root


DOMAINS = ["--domains", "chemistry,math"]


def test_a_published_directory_is_imported(tmp_path):
    source = published(tmp_path / "published")
    status = run(["artifacts", "import", str(source), "-o", str(tmp_path / "x"), *DOMAINS, "-q"])
    assert status == 0


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_probe_is_refused_and_does_nothing(tmp_path, form, capsys):
    source, marker = published(tmp_path / "published"), tmp_path / "marker"
    probe = source / "probe1_base.pt" / "probe_layer_0.pt"
    if form == "torch":
        torch.save({"state_dict": Trap(marker)}, probe)
        torch.load(probe, weights_only=False)
    else:
        probe.write_bytes(pickle.dumps(Trap(marker)))
        pickle.loads(probe.read_bytes())
    marker.rmdir()  # it works, then
    status = run(["artifacts", "import", str(source), "-o", str(tmp_path / "x"), *DOMAINS])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1)
    assert "probe_layer_0.pt: cannot be read as weights" in said
    assert not marker.exists()
    assert not (tmp_path / "x").exists()


def test_pickled_weights_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    marker = tmp_path / "marker"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(marker)))
    for command in (["show"], ["convert"], ["chat", "--prompt", "x"]):
        assert run([command[0], str(tmp_path), *command[1:]]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not marker.exists()
