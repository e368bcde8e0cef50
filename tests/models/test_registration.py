"""Per-layer checkpoints in a fresh process: with their own files, and with ours registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# Each runs in a process of its own, `install` being what `import spp_export` calls. That it may
# come after the auto classes is tried by check_loading.py.
ORDERS = {
    "before the auto classes": "install(); from transformers import AutoModelForCausalLM",
    "before a model class, which imports the auto classes halfway": (
        "install(); install(); from transformers import LlamaForCausalLM"
    ),
    "before our own classes": "install(); import spp_export.models.modeling.modeling_spp",
}
PREAMBLE = """
import sys
from spp_export.models.registration import install
assert not {"torch", "transformers"} & set(sys.modules)
"""
LOAD = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for auto in (AutoModel, AutoModelForCausalLM):
    print(type(auto.from_config(AutoConfig.for_model("spp_qwen3", num_hidden_layers=1,
        hidden_size=8, vocab_size=9, intermediate_size=8, head_dim=4, num_attention_heads=2,
        num_key_value_heads=1, per_layer_config={0: {"num_attention_heads": 1}}))).__qualname__)
print([finder for finder in sys.meta_path if "spp_export" in type(finder).__module__])
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds what this one finds, from another directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "order",
    [name if "halfway" in name else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS],
)
def test_registration_works_in_any_order_of_imports(tmp_path, order):
    """The hardest in `make test`; its other tests are of the others already."""
    expected = ["SppQwen3Model", "SppQwen3ForCausalLM", "[]"]
    result = run("-W", "error", "-c", PREAMBLE + ORDERS[order] + LOAD, cwd=tmp_path)
    assert result.stdout.split("\n")[:3] == expected, result.stderr


def test_importing_the_package_is_light(tmp_path):
    code = "import sys, spp_export; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run("-c", code, cwd=tmp_path).stdout == "set()\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    result = run(str(TESTS / "loading" / "build_loading.py"), str(out), cwd=out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--registered"]], ids=["remote-code", "registered"])
def test_checkpoints_load_in_a_fresh_process(built, tmp_path, mode):
    script = TESTS / "loading" / "check_loading.py"
    result = run(str(script), str(built), *mode, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
