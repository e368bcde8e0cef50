"""Quantise an export to 8 bits with llm-compressor, for transformers and vLLM.

Needs llm-compressor in the same environment as spp: pip install llmcompressor. The result is a
directory in the format of compressed-tensors. Where that package is installed it loads in
transformers, as the export does; so it does in vLLM: `vllm serve out/chemistry-int8`. What it
costs, and which bits vLLM's kernels take, is in docs/engines.md.
"""

import importlib.util
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_export

SCENARIO = Path(__file__).with_name("chemistry.txt")
QUANTISED = Path("out/chemistry-int8")
# Of the 8 in which a weight is stored. vLLM's kernel for CPUs without VNNI overflows with all 8.
BITS = 7


def main() -> None:
    """Export, quantise, and answer a question with what was written."""
    if importlib.util.find_spec("llmcompressor") is None:
        sys.exit("quantise.py needs llm-compressor. Run: pip install llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    result = spp_export.export(SCENARIO, keep=0.8, output="out/chemistry", force=True)
    model = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(result.path)

    # A scale per row of a weight, and one per token of what it is multiplied with.
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": BITS, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    }
    recipe = QuantizationModifier(config_groups={"int8": scheme}, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(QUANTISED)
    tokenizer.save_pretrained(QUANTISED)
    config = json.loads((QUANTISED / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8
    (QUANTISED / "config.json").write_text(json.dumps(config, indent=2))

    # `import spp_export` has registered the classes, so trust_remote_code is not needed.
    quantised = AutoModelForCausalLM.from_pretrained(QUANTISED)
    question = [{"role": "user", "content": "What is an acid?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = quantised.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
