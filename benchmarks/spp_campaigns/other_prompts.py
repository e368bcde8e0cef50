"""Whether an export foretells what it loses on prompts that it has never seen.

`python -m spp_campaigns.other_prompts --scenario FILE` exports the model for every second prompt of
a scenario. The dense model then answers the other prompts, drawn with another seed, and both models
read the answers: the mean over answer tokens of KL(dense || slim) is compared with the interval
that the export's own summary printed. Answers, tokens and KL are made here with transformers and
torch alone, with nothing of what `spp` measures by.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_export
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.models.hub import DEMO, demo_model

_ROWS = 16
_COLUMNS = {
    "scenario": "{scenario}",
    "foretold KL": "{foretold[mean_kl]:.3f} [{foretold[low]:.3f}, {foretold[high]:.3f}]",
    "tokens": "{foretold[tokens]}",
    "measured KL": "{measured[mean_kl]:.3f}",
    "standard error": "{measured[standard_error]:.3f}",
    "of tokens": "{measured[tokens]}",
    "within": "{within}",
    "same token foretold": "{foretold[same_token]:.1%}",
    "measured": "{measured[same_token]:.1%}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each scenario; 1 where one is not within its interval."""
    made = parser(__doc__, writes=True)
    made.add_argument("--scenario", type=Path, action="append", required=True, help="repeatable")
    made.add_argument("--model", default=DEMO, help="directory or demo")
    made.add_argument("--artifacts", help="artifacts of the model; not needed for demo")
    made.add_argument("--units", default="heads", help="heads, channels or both")
    made.add_argument("--keep", type=float, default=0.8, help="share kept")
    made.add_argument("--tokens", type=int, default=96, help="of the longest answer")
    made.add_argument("--seed", type=int, default=1, help="of the answers measured on; spp's is 0")
    options = made.parse_args(arguments)
    model = demo_model() if options.model == DEMO else Path(options.model)
    rows = []
    for scenario in options.scenario:
        text = scenario.read_text(encoding="utf-8")
        prompts = [part.strip() for part in text.split("\n\n") if part.strip()]
        with scratch(options) as place:
            own = place / scenario.name
            own.write_text("\n\n".join(prompts[::2]) + "\n", encoding="utf-8")
            exported = spp_export.export(
                own,
                place / "slim",
                model=options.model,
                artifacts=options.artifacts,
                units=options.units,
                keep=options.keep,
                answer_tokens=options.tokens,
            )
            assert exported.report
            quality = exported.report["quality"]
            measured = judge(model, place / "slim", prompts[1::2], options.tokens, options.seed)
        low, high = quality["intervals"]["mean_kl"]
        rows.append(
            {
                "scenario": scenario.stem,
                "prompts": len(prompts[::2]),
                "other_prompts": len(prompts[1::2]),
                "foretold": {
                    "mean_kl": quality["mean_kl"],
                    "low": low,
                    "high": high,
                    "same_token": quality["top1"],
                    "answers": quality["texts"],
                    "tokens": quality["tokens"],
                },
                "measured": measured,
                "within": low <= measured["mean_kl"] <= high,
            }
        )
    document = {
        "machine": machine(),
        "model": options.model,
        "units": options.units,
        "keep": options.keep,
        "seed": options.seed,
        "rows": rows,
    }
    finish(options, document, "", table(_COLUMNS, rows))
    return int(not all(row["within"] for row in rows))


def judge(
    dense_path: Path, slim_path: Path, prompts: Sequence[str], tokens: int, seed: int
) -> dict[str, Any]:
    """Mean KL in nats and the share of the same likeliest token, over the tokens of the dense
    model's answers of at most so many tokens; the standard error is of the mean over answers."""
    tokenizer = AutoTokenizer.from_pretrained(dense_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dense = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32).eval()
    # By the classes that `import spp_export` registers, so that no code of a checkpoint is run.
    slim = AutoModelForCausalLM.from_pretrained(slim_path, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    sums: list[tuple[float, int, int]] = []
    for start in range(0, len(prompts), _ROWS):
        asked = [_asked(tokenizer, prompt) for prompt in prompts[start : start + _ROWS]]
        read = tokenizer(asked, return_tensors="pt", **_PLAIN)
        told = _answered(dense, {name: read[name] for name in _READ}, tokens)
        sums += [compared(dense, slim, ids, length) for ids, length in told]
    kl, same, count = (sum(values) for values in zip(*sums, strict=True))
    mean = kl / count
    # Of a ratio of sums over answers, which are what was drawn independently.
    spread = statistics.stdev(of - mean * length for of, _, length in sums)
    return {
        "mean_kl": round(mean, 4),
        "standard_error": round(spread * len(sums) ** 0.5 / count, 4),
        "same_token": round(same / count, 4),
        "answers": len(sums),
        "tokens": count,
    }


_READ = ("input_ids", "attention_mask")
# The chat template writes special tokens itself.
_PLAIN: dict[str, Any] = {"padding": True, "add_special_tokens": False}


def _asked(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return prompt
    chat = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


@torch.no_grad()
def _answered(dense: Any, asked: Any, tokens: int) -> list[tuple[list[int], int]]:
    """Each prompt with the dense model's answer, as token ids, and how many of them the answer is,
    the one that ends it among them."""
    width = asked["input_ids"].shape[1]
    written = dense.generate(
        **asked, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens
    )
    ends = dense.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    told = []
    for ids, seen in zip(written.tolist(), asked["attention_mask"].tolist(), strict=True):
        said = ids[width:]
        length = next((at + 1 for at, id_ in enumerate(said) if id_ in ends), len(said))
        told.append((ids[seen.count(0) : width + length], length))
    return told


@torch.no_grad()
def compared(dense: Any, slim: Any, ids: Sequence[int], length: int) -> tuple[float, int, int]:
    """Of an answer, the last `length` of these tokens: the sum over them of KL(dense || slim), how
    many of them both models find likeliest alike, and how many there are."""
    given = torch.tensor([ids])
    log_p, log_q = (
        model(input_ids=given).logits[0, -length - 1 : -1].double().log_softmax(-1)
        for model in (dense, slim)
    )
    same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return float((log_p.exp() * (log_p - log_q)).sum()), int(same), length


if __name__ == "__main__":
    sys.exit(main())
