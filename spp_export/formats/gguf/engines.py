"""Which engines load a GGUF file."""

from __future__ import annotations

from spp_export.models.engines import Engine

# llama.cpp's architectures that whatever is built on it is sure to know.
_COMMON = ("llama", "qwen2", "qwen3")


def gguf_engines(architecture: str) -> tuple[Engine, ...]:
    """Engines for a GGUF directory whose file is of this architecture of llama.cpp's."""
    common = architecture in _COMMON
    how = "" if common else f"where its llama.cpp knows the architecture {architecture}; "
    return (
        Engine("llama.cpp", "yes", f"spp chat, or llama-cli -m; architecture {architecture}"),
        Engine("Ollama", "expected", f"{how}not run here"),
        Engine("LM Studio", "expected", f"{how}not run here"),
    )
