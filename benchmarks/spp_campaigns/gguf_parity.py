"""Greedy decoding of a slim model in llama.cpp:
`python -m spp_campaigns.gguf_parity SLIM=GGUF ...`.

Ten prompts through the chat template, 32 tokens each: PyTorch in single precision (the safetensors
directory SLIM) and llama.cpp (the unquantised GGUF directory made from it). Where two tokens
differ, the text before them is the same, so the margin between their logits tells a near tie,
which rounding decides, from a defect. Exits with 1 for a defect.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from spp_campaigns.command import finish, machine, parser
from spp_campaigns.onnx_parity import PROMPTS

_NEW_TOKENS = 32
# How far a difference of two logits may differ between two such programs: 1e-4 was seen.
_NEAR_TIE = 1e-3
_LIKELIEST = 8


def compare(slim: Path, gguf: Path) -> dict[str, Any]:
    """Every prompt's tokens from both, and where they differ."""
    import torch

    from spp_export.formats.gguf.llama_cpp import LlamaCpp, engine_name
    from spp_export.models.loader import load_slim
    from spp_export.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(slim)
    model = load_slim(slim, dtype="float32")
    config = json.loads((gguf / "config.json").read_text(encoding="utf-8"))["spp_gguf"]
    texts = [_prompt(tokenizer, prompt) for prompt in PROMPTS]
    room = max(map(len, texts)) + _NEW_TOKENS + 1
    rows = []
    with closing(LlamaCpp(gguf / "model.gguf", room, torch.get_num_threads())) as engine:
        for prompt, ids in zip(PROMPTS, texts, strict=True):
            steps = engine.generate(ids, _NEW_TOKENS, _LIKELIEST)
            rows.append({"prompt": prompt, **_row(model, ids, steps)})
    return {"gguf": config, "engine": engine_name(), "rows": rows}


def _prompt(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _row(model: Any, ids: list[int], steps: Any) -> dict[str, Any]:
    """PyTorch's choice at each of llama.cpp's steps, after the same tokens."""
    import torch

    tokens = [step.token for step in steps]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens[:-1]])).logits[0, -len(tokens) :].double()
    best = logits.argmax(-1).tolist()
    worst = max(
        abs((value - step.likeliest[0][1]) - float(row[token] - row[step.token]))
        for step, row in zip(steps, logits, strict=True)
        for token, value in step.likeliest
    )
    apart = next((i for i, token in enumerate(tokens) if best[i] != token), None)
    margin = None
    if apart is not None:
        margin = float(logits[apart, best[apart]] - logits[apart, tokens[apart]])
    return {
        "tokens": len(tokens),
        "same": apart is None,
        "parts_at": apart,
        "margin": margin,
        "largest_difference": worst,
    }


def main() -> int:
    """Compare, print a line per prompt, and write the results."""
    made = parser(__doc__)
    made.add_argument("pairs", nargs="+", metavar="SLIM=GGUF")
    options = made.parse_args()
    results, lines, equal = {}, list[str](), True
    for pair in options.pairs:
        slim, gguf = map(Path, pair.split("="))
        result = results[gguf.name] = compare(slim, gguf)
        lines.append(f"{gguf.name}: {result['gguf']['architecture']}, {result['engine']}")
        for row in result["rows"]:
            near = row["margin"] is not None and row["margin"] <= _NEAR_TIE
            equal = equal and (row["same"] or near)
            mark = "same" if row["same"] else f"parts at {row['parts_at']}, by {row['margin']:.2g}"
            lines.append(f"{row['tokens']:3} tokens  {mark}  {row['prompt']}")
    finish(options, {**machine(), "near_tie": _NEAR_TIE, "results": results}, *lines)
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
