"""Which engines load what we write. Each line is a fact that was run, with the version it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spp_export.shape import LayerShape


@dataclass(frozen=True)
class Engine:
    """One engine, whether it loads the output, and what the user must know."""

    name: str
    loads: bool
    how: str

    def to_dict(self) -> dict[str, str | bool]:
        """For `--json`."""
        return asdict(self)


def engines_for(layout: str, layers: tuple[LayerShape, ...]) -> tuple[Engine, ...]:
    """Engines for a safetensors directory of this layout and these layers."""
    if layout == "uniform":
        return (
            Engine("transformers", True, "stock class, 4.57 or newer"),
            Engine("vLLM", True, "stock class"),
            Engine("llama.cpp", True, "convert_hf_to_gguf.py, where heads x head_dim is accepted"),
        )
    same_kv = len({layer.kv_heads for layer in layers}) == 1
    return (
        Engine(
            "transformers",
            True,
            "4.57 or newer: trust_remote_code=True, or after import spp_export",
        ),
        Engine(
            "vLLM", True, "0.29 or newer, Transformers backend, --trust-remote-code; not run here"
        ),
        Engine("mlx-lm", False, "needs a model_file of its own, which is not written yet"),
        Engine("llama.cpp", False, "needs its own GGUF conversion, which is not written yet"),
        Engine(
            "SGLang",
            False,
            "needs the same KV heads in every layer"
            + (" (this plan has them) and a model package of its own" if same_kv else ""),
        ),
    )
