"""Which engines load what we write, and how well we know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_export.shape import LayerShape

# yes: a test of this project loads and runs it. expected: the engine's source or its users say so,
# and no test of ours does. no: it is known not to.
Loads = Literal["yes", "expected", "no"]


@dataclass(frozen=True)
class Engine:
    """One engine, whether it loads the output, and what the user must know."""

    name: str
    loads: Loads
    how: str

    def to_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def engines_for(layout: str, layers: Sequence[LayerShape]) -> tuple[Engine, ...]:
    """Engines for a safetensors directory of this layout and these layers."""
    if layout == "uniform":
        return (
            Engine("transformers", "yes", "4.57 or newer, stock class, no code"),
            Engine("vLLM", "expected", "stock class; not run here"),
            Engine("llama.cpp", "expected", "by its own converter; not run here"),
            Engine("SGLang", "expected", "stock class; not run here"),
        )
    same_kv = len({layer.kv_heads for layer in layers}) == 1
    return (
        Engine(
            "transformers",
            "yes",
            "4.57 or newer: trust_remote_code=True, or after import spp_export",
        ),
        Engine(
            "vLLM",
            "expected",
            "0.29 or newer, Transformers backend, --trust-remote-code; not run here",
        ),
        Engine("llama.cpp", "no", "its converter takes one head count for all layers"),
        Engine(
            "SGLang",
            "no",
            "one head count for all layers in its Llama"
            if same_kv
            else "one count of KV heads for all layers",
        ),
    )
