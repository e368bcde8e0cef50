"""Per-layer models for vLLM, by its own fused layers: found through `vllm.general_plugins`.

With this package installed beside vLLM 0.29 or newer nothing has to be imported or trusted: vLLM
calls `register` in each of its processes. Without it, a per-layer directory runs on vLLM's
Transformers backend with `--trust-remote-code`.
"""

from __future__ import annotations

from spp_export.models.families import FAMILIES
from spp_export.models.families.served import PLUGIN

_MODELS = "spp_export.models.vllm.models"


def register() -> None:
    """Tell vLLM which classes run our architectures, and transformers how to read their configs.

    Classes are given by name: importing them here would set up CUDA in vLLM's first process.
    """
    from vllm import ModelRegistry

    import spp_export.models.modeling  # noqa: F401  registers the configs

    for name in sorted(PLUGIN):  # others run on its Transformers backend
        architecture = f"Spp{FAMILIES[name].architecture}"
        ModelRegistry.register_model(architecture, f"{_MODELS}:{architecture}")
