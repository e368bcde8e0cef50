"""Which other engines have a class of their own for a family, by their registries of model classes.

None of this is run by a test. A family that is not named here is one of which nothing is said.
"""

from __future__ import annotations

# vllm/model_executor/models/registry.py.
VLLM = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "granite", "seed_oss", "ernie4_5", "cwm", "arcee"),
        *("nemotron", "starcoder2", "exaone4", "cohere", "cohere2", "gemma", "gemma2"),
        *("gemma3_text", "olmo", "olmo2", "olmo3", "phi", "phi3", "glm", "glm4", "stablelm"),
        *("jais2", "apertus", "opt", "gpt_neox", "gptj", "gpt2", "falcon", "bloom", "mpt"),
        *("gpt_bigcode", "persimmon", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"),
        *("granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "olmoe", "minimax_m2"),
    }
)
# Those of which this package has one for layers that differ (spp_export.models.vllm).
PLUGIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# sglang/srt/models.
SGLANG = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "granite", "arcee", "apertus", "cohere"),
        *("cohere2", "gemma2", "gemma3_text", "gpt2", "starcoder2", "mixtral"),
    }
)
# Whose stock attention does not go by transformers' interface of attention functions, which vLLM's
# Transformers backend puts its own in the place of (`_supports_attention_backend`).
OWN_ATTENTION = frozenset({"stablelm", "gptj", "falcon", "bloom", "mpt", "gpt_neo"})
# Others that go by it and have no class there.
BACKEND = frozenset({"hyperclovax", "smollm3", "ministral", "ministral3", "nanochat", "bitnet"})
# What onnxruntime-genai knows by the name of the family; others it runs as "decoder".
GENAI = frozenset({"llama", "mistral", "qwen2", "qwen3"})
