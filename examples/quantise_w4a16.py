"""Store an export's weights in 4 bits with llm-compressor, and measure what that costs.

Needs llm-compressor, which wants an older transformers than spp's newest, so give it an environment
of its own: pip install . llmcompressor==0.14.0.1. The result loads in transformers with
`trust_remote_code=True` and in vLLM as any export does; both need the package compressed-tensors.
"""

import importlib.util
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_export
from spp_export.models.hub import demo_model

DATA = Path(__file__).parents[1] / "benchmarks" / "data"
# What the plan and the rounding are made for, and text of its domain that neither has seen.
SCENARIO = DATA / "scenarios" / "chemistry.txt"
HELD_OUT = DATA / "pools" / "chemistry" / "val.txt"
TEXTS, TOKENS = 24, 256
# Weights that share a scale; it must divide every width, as export's multiple of channels does.
GROUP = 64


def main() -> None:
    """Export, quantise the dense and the slim model, and compare all of them with the dense one."""
    if importlib.util.find_spec("llmcompressor") is None:
        sys.exit("quantise_w4a16.py needs llm-compressor. Run: pip install llmcompressor==0.14.0.1")
    slim = spp_export.export(SCENARIO, keep=0.8, units="both", output="out/slim", force=True)
    sources = {"dense": demo_model(), "slim": slim.path}
    rows = {"dense": sources["dense"]}
    for name, source in sources.items():
        rows[f"{name}, 4 bits"] = quantise(source, Path(f"out/{name}-w4a16"))
    rows["slim"] = slim.path
    expected = logits_of(rows["dense"])
    for name, path in rows.items():
        kl = mean_kl(expected, logits_of(path))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"{name:14} {size / 1e6:6.1f} MB, mean KL {kl:.4f} nats per token")


def quantise(source: Path, output: Path) -> Path:
    """By GPTQ, on the scenario's texts: every projection of every layer, not embedding and head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = SCENARIO.read_text(encoding="utf-8").split("\n\n")
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        tokenizer=tokenizer,
        dataset=Dataset.from_list([dict(tokenizer(text)) for text in texts]),
        recipe=GPTQModifier(config_groups={"projections": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(texts),
        trust_remote_code_model=True,
        output_dir=str(output),
    )
    return output


@torch.no_grad()
def logits_of(path: Path) -> list[torch.Tensor]:
    """Log-probabilities [T,V] of the first tokens of every held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    texts = HELD_OUT.read_text(encoding="utf-8").split("\n\n")[:TEXTS]
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        found.append(model(ids).logits[0].log_softmax(-1))
    return found


def mean_kl(dense: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of KL(dense || other) at every token."""
    pairs = zip(dense, other, strict=True)
    sums = [(one.exp() * (one - two)).sum().item() for one, two in pairs]
    return math.fsum(sums) / sum(len(rows) for rows in dense)


if __name__ == "__main__":
    main()
