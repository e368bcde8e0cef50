"""`spp_export.vllm_plugin:register`: the entry point that vLLM looks for."""

from spp_export.models.vllm import register as register
