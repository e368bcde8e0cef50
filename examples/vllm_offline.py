"""Run an export in vLLM.

Needs a CUDA card, and vLLM 0.29 or newer in the same environment as spp: pip install vllm. vLLM
finds the per-layer models by spp's plugin; nothing has to be imported or trusted. `vllm serve
out/chemistry` starts a server instead. This script has not been run on a card by this project.
"""

import importlib.util
import sys
from pathlib import Path

import spp_export

SCENARIO = Path(__file__).with_name("chemistry.txt")


def main() -> None:
    """Export for one card, and answer two questions."""
    if importlib.util.find_spec("vllm") is None:
        sys.exit("vllm_offline.py needs vLLM and a CUDA card. Run: pip install vllm")
    from vllm import LLM, SamplingParams

    # tp=2 would choose only layers whose heads divide between two cards.
    result = spp_export.export(SCENARIO, keep=0.8, tp=1, output="out/chemistry", force=True)
    engine = LLM(model=str(result.path), dtype="bfloat16", max_model_len=1024)
    questions = ("What is an acid?", "Name three noble gases and one use of each.")
    chats = [[{"role": "user", "content": question}] for question in questions]
    for answer in engine.chat(chats, SamplingParams(temperature=0, max_tokens=40)):
        print(answer.outputs[0].text)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
