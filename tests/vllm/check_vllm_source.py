"""What the plugin relies on, in the source of vLLM: `python check_vllm_source.py WHEEL...`.

vLLM needs a card to run, and its source none to be read. Prints a line per wheel; the exit status
is 1 where something is missing.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator, Sequence

_MODELS = "vllm/model_executor/models"
# file -> class -> method -> parameters that are passed to it by name or place
METHODS = {
    f"{_MODELS}/llama.py": {
        "LlamaDecoderLayer": {"__init__": ("vllm_config", "prefix", "config")},
        "LlamaModel": {"__init__": ("vllm_config", "prefix", "layer_type")},
        "LlamaForCausalLM": {"_init_model": ("vllm_config", "prefix", "layer_type")},
        "LlamaAttention": {"__init__": ("config", "num_heads", "num_kv_heads", "bias_o_proj")},
    },
    f"{_MODELS}/mistral.py": {
        "MistralDecoderLayer": {"__init__": ("vllm_config", "prefix", "config")},
        "MistralModel": {"__init__": ("vllm_config", "prefix", "layer_type")},
        "MistralForCausalLM": {"_init_model": ("vllm_config", "prefix", "layer_type")},
    },
    f"{_MODELS}/qwen3.py": {
        "Qwen3DecoderLayer": {"__init__": ("config", "cache_config", "quant_config", "prefix")},
        "Qwen3Model": {"__init__": ("vllm_config", "prefix")},
    },
    "vllm/entrypoints/llm.py": {
        "LLM": {
            "__init__": (
                "model",
                "skip_tokenizer_init",
                "dtype",
                "seed",
                "gpu_memory_utilization",
                "enforce_eager",
            ),
            "generate": ("prompts", "sampling_params", "use_tqdm"),
        }
    },
    f"{_MODELS}/registry.py": {"_ModelRegistry": {"register_model": ("model_arch", "model_cls")}},
}
# file -> words that its text must hold
WORDS = {
    f"{_MODELS}/llama.py": ('hasattr(config, "qkv_bias")', 'getattr(config, "head_dim", None)'),
    f"{_MODELS}/qwen3.py": ("decoder_layer_type: type[nn.Module] = Qwen3DecoderLayer",),
    f"{_MODELS}/utils.py": ("def extract_layer_index(",),
    "vllm/engine/arg_utils.py": ("max_model_len: ", "generation_config: "),
    "vllm/sampling_params.py": (
        "top_k: int",
        "seed: int | None",
        "stop_token_ids: list[int] | None",
        "ignore_eos: bool",
        "detokenize: bool",
    ),
    "vllm/plugins/__init__.py": ('"vllm.general_plugins"',),
    # The Transformers backend, which runs directories where the plugin is not installed.
    "vllm/transformers_utils/model_arch_config_convertor.py": (
        "per_layer_config",
        "is_heterogeneous",
    ),
    f"{_MODELS}/transformers/base.py": ("create_attention_instances",),
}


def problems(wheel: zipfile.ZipFile) -> Iterator[str]:
    """What is not as the plugin expects it."""
    names = set(wheel.namelist())
    for file, classes in METHODS.items():
        if file not in names:
            yield f"{file} is missing"
            continue
        found = {
            node.name: node
            for node in ast.parse(wheel.read(file)).body
            if isinstance(node, ast.ClassDef)
        }
        for name, methods in classes.items():
            for method, parameters in methods.items():
                yield from _lacking(found.get(name), f"{file}: {name}", method, parameters)
    for file, words in WORDS.items():
        text = wheel.read(file).decode() if file in names else ""
        yield from (f"{file}: no {word}" for word in words if word not in text)


def _lacking(
    node: ast.ClassDef | None, where: str, method: str, parameters: Sequence[str]
) -> Iterator[str]:
    functions = (
        {}
        if node is None
        else {entry.name: entry for entry in node.body if isinstance(entry, ast.FunctionDef)}
    )
    if method not in functions:
        yield f"{where}.{method} is missing"
        return
    arguments = functions[method].args
    given = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    yield from (f"{where}.{method} takes no {name}" for name in parameters if name not in given)


def main(paths: Sequence[str]) -> int:
    """Check every wheel."""
    failed = not paths
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            found = list(problems(wheel))
        failed |= bool(found)
        print(f"{path.rpartition('/')[2]}: {'; '.join(found) or 'as the plugin expects it'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
