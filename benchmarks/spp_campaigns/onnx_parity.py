"""Greedy decoding in three runtimes: `python -m spp_campaigns.onnx_parity SLIM ONNX`.

Ten prompts through the chat template, 48 tokens each: PyTorch (the slim checkpoint), ONNX Runtime
and onnxruntime-genai (the ONNX directory made from it). Exits with 1 if any token differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    "What is an acid?",
    "Explain how a catalyst lowers the activation energy.",
    "Balance the equation H2 + O2 -> H2O.",
    "What is a covalent bond?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What does pH measure?",
    "Describe the periodic table.",
    "How do batteries work?",
    "Name three noble gases.",
)
_NEW_TOKENS = 48


def chat_tokens(directory: Path) -> list[list[int]]:
    """Answers as `spp chat --prompt` gives them, closing tokens included."""
    import spp_export

    answers = []
    for prompt in PROMPTS:
        chat = spp_export.open_chat(directory)
        answers.append(list(chat.ask(prompt, max_new_tokens=_NEW_TOKENS).token_ids))
    return answers


def genai_tokens(directory: Path) -> list[list[int]]:
    """The same answers by onnxruntime-genai, which leaves closing tokens out."""
    import numpy as np
    import onnxruntime_genai as og

    import spp_export

    model: Any = og.Model(str(directory))
    answers = []
    for prompt in PROMPTS:
        chat = spp_export.open_chat(directory)
        ids = list(chat.ask(prompt, max_new_tokens=1).prompt_ids)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(ids) + _NEW_TOKENS)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([ids], np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        answers.append(tokens)
    return answers


def main() -> int:
    """Compare and print a line per prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slim", type=Path)
    parser.add_argument("onnx", type=Path)
    arguments = parser.parse_args()
    torch_answers = chat_tokens(arguments.slim)
    others = {"onnxruntime": chat_tokens(arguments.onnx), "genai": genai_tokens(arguments.onnx)}
    equal = True
    for index, prompt in enumerate(PROMPTS):
        expected = torch_answers[index]
        same = {
            name: answers[index] in (expected, expected[:-1])
            if name == "genai"
            else answers[index] == expected
            for name, answers in others.items()
        }
        equal = equal and all(same.values())
        marks = ", ".join(f"{name} {'same' if ok else 'DIFFERENT'}" for name, ok in same.items())
        print(f"{len(expected):3} tokens  {marks}  {prompt}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
