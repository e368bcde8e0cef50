"""A small part of the campaign that `make test-faults` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_some_of_every_fault():
    helpers = os.pathsep.join(map(str, (HERE.parent, HERE.parent / "commands")))
    result = subprocess.run(
        [sys.executable, HERE / "campaign.py", "--small"],
        env={**os.environ, "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every promise held" in result.stdout


def test_a_signal_at_many_bytecodes_of_taking_and_giving_back():
    script = HERE / "every_bytecode.py"
    result = subprocess.run([sys.executable, script, "--small"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" 0 broken\n")
