"""Families other than Llama, from training to files: `python -m spp_campaigns.tiny_models`.

Trains a tiny model of each family on the pools' training text, so that its heads and channels do
something, and takes it through `spp probe`, `export`, `verify`, `recover` and `report`, and to
ONNX. Printed are the KL to the dense model on held-out text of the scenario, by the default
criterion, by three random plans of the same size and after recovery, and what ONNX said.

Exits with 1 where a check fails, or a plan by the criterion is no better than a random one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import spp_export
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.common.errors import SppError
from spp_export.models.families import FAMILIES

_DATA = Path(__file__).resolve().parents[1] / "data"
_DOMAINS = ("chemistry", "finance", "history", "math")
_VOCABULARY, _ROWS, _LENGTH = 1024, 8, 96
_RATE = 3e-3
_SEEDS = (0, 1, 2)
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 1024,
    # About 1 / sqrt(hidden size): with less, so few steps leave attention without a say.
    "initializer_range": 0.08,
    "init_std": 0.08,
    "dropout": 0.0,
}
# What a family's own config calls these, or has beside them.
_MORE: Mapping[str, Mapping[str, Any]] = {
    "opt": {"word_embed_proj_dim": 128},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
_COLUMNS = {
    "family": "{family}",
    "units": "{units}",
    "parameters": "{parameters:,}",
    "dense ppl": "{dense_perplexity:.1f}",
    "KL": "{kl:.3f}",
    "random": "{random_text}",
    "recovered": "{recovered_kl:.3f}",
    "ONNX": "{onnx}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it where asked."""
    made = parser(__doc__, writes=True)
    made.add_argument("--family", action="append", choices=sorted(FAMILIES), help="repeatable")
    made.add_argument("--steps", type=int, default=1200, help="steps of training")
    made.add_argument("--keep", type=float, default=0.7, help="share of the units' parameters")
    options = made.parse_args(arguments)
    rows = []
    with scratch(options) as place:
        tokenizer = _tokenizer(place / "tokenizer")
        for family in options.family or list(_MORE):
            folder = place / family
            folder.mkdir()
            model = _trained(family, tokenizer, folder / "dense", options.steps)
            rows.append(_through_everything(family, model, folder, options.keep))
            print(table(_COLUMNS, rows[-1:]), flush=True)
    settings = {"steps": options.steps, "keep": options.keep}
    document = {"machine": machine(), "settings": settings, "rows": rows}
    finish(options, document, table(_COLUMNS, rows))
    return int(any(row["kl"] >= min(row["random"]) for row in rows))


def _texts(kind: str) -> list[str]:
    texts: list[str] = []
    for domain in _DOMAINS:
        content = (_DATA / "pools" / domain / f"{kind}.txt").read_text(encoding="utf-8")
        texts += [text for text in content.split("\n\n") if text.strip()]
    return texts


def _tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training text."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        _texts("train"), vocab_size=_VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(place)
    return tokenizer


def _trained(family: str, tokenizer: PreTrainedTokenizerFast, out: Path, steps: int) -> Path:
    """A model of the family after so many steps on the pools."""
    torch.manual_seed(0)
    keys = FAMILIES[family].keys
    named = {keys.get(key, key): size for key, size in _SIZES.items()}
    named.pop("", None)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = AutoConfig.for_model(family, **{**named, **ends, **_MORE.get(family, {})})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    ids = np.concatenate([[*tokenizer(text)["input_ids"], 2] for text in _texts("train")])
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        starts = random.integers(0, len(ids) - _LENGTH, _ROWS)
        batch = torch.from_numpy(np.stack([ids[start : start + _LENGTH] for start in starts]))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _through_everything(family: str, model: Path, folder: Path, keep: float) -> dict[str, Any]:
    """Every command on a trained model. Raises SppError for a check that fails."""
    named, artifacts = str(model), folder / "artifacts"
    units: Any = "heads" if FAMILIES[family].experts else "both"
    answers: dict[str, Any] = {"answer_tokens": 32}
    spp_export.probe(
        _DATA / "pools", artifacts, model=named, domains=_DOMAINS, units=units, **answers
    )
    asked: dict[str, Any] = {
        "model": named,
        "artifacts": artifacts,
        "keep": keep,
        "units": units,
        "width_multiple": 16,
        **answers,
    }
    scenario = _DATA / "scenarios" / "chemistry.txt"
    slim = spp_export.export(scenario, folder / "slim", **asked)
    random = [
        _kl(
            spp_export.export(
                scenario, folder / f"random-{seed}", criterion="random", seed=seed, **asked
            )
        )
        for seed in _SEEDS
    ]
    assert spp_export.verify(folder / "slim", model=named).passed
    recovered = spp_export.recover(
        folder / "slim",
        _DATA / "pools" / "chemistry" / "train.txt",
        folder / "recovered",
        model=named,
        steps=60,
        layer_rounds=0,
        **answers,
    )
    spp_export.report(folder / "slim", folder / "report.html")
    quality = (slim.report or {})["quality"]
    return {
        "family": family,
        "units": units,
        "parameters": slim.predicted.dense_parameters,
        "dense_perplexity": quality["dense_perplexity"],
        "kl": _kl(slim),
        "tokens": quality["tokens"],
        "random": random,
        "random_text": " ".join(f"{kl:.3f}" for kl in random),
        "recovered_kl": recovered.after.mean_kl if recovered.after else None,
        "onnx": _onnx(folder),
    }


def _onnx(folder: Path) -> str:
    """What `spp convert` says of the slim model."""
    try:
        converted = spp_export.convert(str(folder / "slim"), folder / "onnx", format="onnx")
    except SppError as error:
        return f"refused: {error}"
    assert converted.report is not None
    return "equal" if converted.report["passed"] else "differs"


def _kl(result: Any) -> float:
    found: float = result.report["quality"]["mean_kl"]
    return found


if __name__ == "__main__":
    sys.exit(main())
