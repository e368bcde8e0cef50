"""Which other engines run a family, as far as that is known.

tests/vllm runs what is said of vLLM, on a CPU. No test runs all that is said of the others, which
have a class of a family by their registries. Of a family that is not named nothing is known.
"""

from __future__ import annotations

# Those of which this package has a class for layers that differ (spp_export.models.vllm).
PLUGIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Those that vLLM's Transformers backend runs, layers that differ too.
BACKEND = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "granite", "seed_oss", "ernie4_5", "smollm3"),
        *("ministral", "ministral3", "cwm", "hyperclovax", "arcee", "nemotron", "starcoder2"),
        *("exaone4", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "olmo", "phi", "phi3"),
        *("glm", "glm4", "stablelm", "jais2", "apertus", "nanochat", "mixtral", "qwen3_moe"),
        *("qwen2_moe", "gpt_oss", "granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "opt"),
        *("gpt_bigcode", "persimmon", "olmo2", "olmo3", "olmoe", "bitnet"),
    }
)
# Those that it does not run, and of which vLLM has at most a class for layers that are alike.
NOT_BACKEND = frozenset({"bloom", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "phimoe"})
# Those whose uniform models vLLM takes without an option for stock ones, and that its own class, or
# the backend, then computes as transformers does.
VLLM = BACKEND - {"qwen2", "cohere2", "ernie4_5_moe", "olmoe", "stablelm"} | {
    "gpt2",
    "gpt_neox",
    "gptj",
}
# sglang/srt/models.
SGLANG = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "granite", "arcee", "apertus", "cohere"),
        *("cohere2", "gemma2", "gemma3_text", "gpt2", "starcoder2", "mixtral"),
    }
)
# What onnxruntime-genai knows by the name of the family; others it runs as "decoder".
GENAI = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Some of those others, of which tests run a model there.
GENAI_DECODERS = frozenset({"mixtral", "glm4_moe", "gpt_oss"})
# Those that transformers.js 4.3 has a class of a decoder for, of all that become ONNX; it loads no
# others. tests/transformers_js looks them up.
TRANSFORMERS_JS = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "granite", "ernie4_5", "smollm3", "ministral"),
        *("ministral3", "arcee", "starcoder2", "cohere", "cohere2", "gemma", "gemma2"),
        *("gemma3_text", "olmo", "olmo2", "olmo3", "phi", "phi3", "glm", "stablelm", "apertus"),
        *("nanochat", "qwen2_moe", "qwen3_moe", "gpt_oss", "opt", "gpt_neox", "gptj", "gpt2"),
        *("falcon", "bloom", "mpt", "gpt_neo", "gpt_bigcode"),
    }
)
# Those of experts that tests run there, as they do the families that onnxruntime-genai knows.
EXPERTS_IN_JS = frozenset({"qwen2_moe", "qwen3_moe", "gpt_oss"})
