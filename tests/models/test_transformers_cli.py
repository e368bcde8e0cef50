"""transformers' command line finds our classes; a server itself is for `make test-serving`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import transformers

from spp_export.models.families import FAMILIES

pytestmark = pytest.mark.slow

# In place of the command line: what the server knows as the package `transformers`.
_FIND = """
import sys, types
def main():
    from transformers.cli.serving import model_manager
    print([name for name in {names!r} if not hasattr(model_manager.transformers, name)])
sys.modules["transformers.cli.transformers"] = types.SimpleNamespace(main=main)
from spp_export.models.modeling import transformers_cli
transformers_cli.main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


def test_it_is_the_command_line_of_transformers():
    result = run("-m", "spp_export.transformers_cli", "version")
    if transformers.__version__.startswith("4."):
        assert result.returncode == 2
        assert result.stderr.startswith("error: transformers has no command line here")
        assert result.stderr.count("\n") == 1
    else:
        assert (result.returncode, result.stdout.strip()) == (0, transformers.__version__)


def test_the_classes_are_where_its_server_looks():
    """transformers replaces its package in sys.modules once while it is imported."""
    if transformers.__version__.startswith("4."):
        return
    names = [f"Spp{family.architecture}" for family in FAMILIES.values()]
    result = run("-c", _FIND.format(names=names))
    assert result.stdout.strip() == "[]", result.stderr
