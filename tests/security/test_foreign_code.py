"""Code that comes with a model is never run, whatever the command and whatever stdin says."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from factories import CASES, random_layers, read_config, shape_of, write_slim
from transformers import AutoTokenizer

from spp_cli.main import run
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.loader import load_dense, load_slim

ALPHABETS = {"figures": "12 + 34 = 46", "letters": "abc def ghi"}
EVIL = """
from pathlib import Path
Path({marker!r}).write_text(__name__)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


def hostile(path: Path, marker: Path, *, tokenizer_class: str) -> Path:
    """A model directory that names code of its own wherever transformers would look for it."""
    code = EVIL.format(marker=str(marker))
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (path / name).write_text(code)
    config = read_config(path)
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    config["custom_pipelines"] = {"text-generation": {"impl": "modeling_evil.EvilModel"}}
    (path / "config.json").write_text(json.dumps(config))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = tokenizer_class
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Where the code leaves its mark; stdin says yes to every question."""
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return tmp_path / "marker"


@pytest.fixture
def pools(tmp_path):
    for domain, text in ALPHABETS.items():
        folder = tmp_path / "pools" / domain
        folder.mkdir(parents=True)
        for part, count in (("train", 6), ("val", 3)):
            lines = [f"{text} {part} {i}" for i in range(count)]
            (folder / f"{part}.txt").write_text("\n\n".join(lines))
    scenario = tmp_path / "sums.txt"
    scenario.write_text("\n\n".join(f"{i} + {i} = {2 * i}" for i in range(6)))
    return tmp_path / "pools"


def test_the_trap_works(tmp_path, marker):
    """Else nothing below would prove anything."""
    dense = hostile(CASES[0].make(tmp_path), marker, tokenizer_class="EvilTokenizer")
    AutoTokenizer.from_pretrained(dense, trust_remote_code=True)
    assert marker.exists()


def test_every_command_leaves_it_alone(tmp_path, marker, pools):
    """The stock classes are there as well, and so the commands work."""
    dense = hostile(CASES[0].make(tmp_path), marker, tokenizer_class="PreTrainedTokenizerFast")
    model = ["--model", str(dense)]
    arts, scenario = str(tmp_path / "arts"), ["--scenario", str(tmp_path / "sums.txt")]
    slim, graph = str(tmp_path / "slim"), str(tmp_path / "graph")
    shared = [*model, *scenario, "--artifacts", arts]
    commands = [
        ["show", str(dense)],
        ["probe", *model, "--pools", str(pools), "-o", arts],
        ["diagnose", *shared],
        ["plan", *shared, "-o", str(tmp_path / "plan.json")],
        ["export", *shared, "-o", slim],
        ["export", *shared, "-o", graph, "--format", "onnx"],
        ["show", slim],
        ["verify", slim, *model, *scenario],
        ["verify", graph, *model, *scenario],
        ["convert", slim, "-o", str(tmp_path / "converted"), *scenario],
        ["convert", str(dense), "-o", str(tmp_path / "dense-graph"), *scenario],
        *(["chat", out, "--prompt", "1", "--max-new-tokens", "1"] for out in (slim, graph)),
        ["chat", str(dense), "--prompt", "1", "--max-new-tokens", "1"],
    ]
    for command in commands:
        assert run([*command, "--quiet"]) == 0, command
        assert not marker.exists(), command
    for out in (Path(slim), Path(graph), tmp_path / "dense-graph"):
        assert not list(out.glob("*evil*"))
        texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md")]
        assert not any("evil" in text.lower() for text in texts)


def test_a_tokenizer_that_is_nothing_without_its_code_is_refused(tmp_path, marker, pools, capsys):
    dense = hostile(CASES[0].make(tmp_path), marker, tokenizer_class="EvilTokenizer")
    target = tmp_path / "arts"
    status = run(["probe", "--model", str(dense), "--pools", str(pools), "-o", str(target)])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) in ((2, 1), (0, 0)), said
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_slim, load_dense, open_source])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_to_fetch_is_refused(tmp_path, load, key):
    dense = CASES[0].make(tmp_path)
    config = read_config(dense) | {key: "evil/kernel"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=key) as caught:
        load(dense)
    assert type(caught.value).__module__ == "spp_export.common.errors"


@pytest.mark.parametrize("load", [load_slim, load_dense, open_source])
def test_an_adapter_does_not_bring_another_model(tmp_path, load):
    dense = CASES[0].make(tmp_path)
    other = {"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}
    (dense / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(Exception, match=r"adapter_config\.json") as caught:
        load(dense)
    assert type(caught.value).__module__ == "spp_export.common.errors"


def test_code_beside_a_slim_checkpoint_is_not_ours_to_run(tmp_path, marker):
    """A per-layer checkpoint carries classes; this package runs its own instead."""
    dense = CASES[1].make(tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 0))
    code = (slim / "modeling_spp.py").read_text()
    trap = f"open({str(marker)!r}, 'w').close()\n"
    (slim / "modeling_spp.py").write_text(
        code.replace("import torch\n", f"import torch\n{trap}", 1)
    )
    assert trap in (slim / "modeling_spp.py").read_text()
    load_slim(slim)
    assert run(["chat", str(slim), "--prompt", "1", "--raw", "--max-new-tokens", "1", "-q"]) == 0
    assert not marker.exists()
    shutil.rmtree(slim)
