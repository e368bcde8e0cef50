"""Text with a token that the model has no embedding for: one line, wherever text meets a model."""

from __future__ import annotations

import json

import pytest
from exporting import ALPHABETS, refused, texts, write_pools, write_texts
from factories import VOCAB, make_checkpoint
from gguf_cases import add_merges
from tokenizers import Tokenizer

import spp_export
from spp_export.common.errors import ModelError

WORD = "<|image|>"
FAMILY, SIZE = "qwen2", {"kv_heads": 2, "query_heads": 4, "layers": 2}
MESSAGE = rf"has token '<\|image\|>', which is {VOCAB + 2} in the tokenizer, and config.json gives"
MESSAGE += rf" the model vocab_size {VOCAB}, so ids up to {VOCAB - 1}\. Use the tokenizer"


def add_tokens(directory):
    """More special tokens than the model has room for, the last one of interest."""
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    free = VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([*(f"<|{i}|>" for i in range(free + 2)), WORD])
    tokenizer.save(path)
    return directory


class Bench:
    """A model whose tokenizer knows more than it does, and what is made of it without the word."""

    def __init__(self, root):
        self.root = root
        self.dense = add_tokens(make_checkpoint(root, FAMILY, **SIZE))
        self.pools = write_pools(root / "pools")
        plain = write_texts(root / "plain.txt", texts("figures", 8, 7))
        self.text = write_texts(root / "text.txt", [*texts("figures", 7, 8), f"1 + {WORD}"])
        self.questions = root / "questions.jsonl"
        lines = [{"prompt": f"{i} +", "answer": "7"} for i in range(4)]
        lines.append({"prompt": "9 +", "answer": WORD})
        self.questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.artifacts = root / "artifacts"
        self.model = {"model": str(self.dense)}
        self.made = {**self.model, "artifacts": self.artifacts}
        spp_export.probe(self.pools, self.artifacts, **self.model)
        self.slim = root / "slim"
        self.plan = root / "plan.json"
        options = {**self.made, "keep": 0.7, "compensate": "none"}
        result = spp_export.export(plain, self.slim, **options)
        self.plan.write_text(result.plan.to_json())
        self.onnx = spp_export.convert(str(self.slim), root / "onnx").path
        self.plain = plain


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("unknown"))


def probe(bench, out):
    pools = write_pools(out / "pools")
    domain = next(iter(ALPHABETS))
    write_texts(pools / domain / "val.txt", [*texts(domain, 4, 9), WORD])
    spp_export.probe(pools, out / "artifacts", **bench.model)


def evaluate(bench, out, **asked):
    options = {**bench.made, "pools": bench.pools, "curves": False, "keep": [0.7], **asked}
    spp_export.evaluate(options.pop("scenario", bench.plain), out / "results", **options)


def recover(bench, out, **data):
    options = {"steps": 1, "data": bench.plain, **data, **bench.model}
    spp_export.recover(bench.slim, output=out / "recovered", **options)


COMMANDS = {
    "probe": probe,
    "diagnose": lambda bench, out: spp_export.diagnose(bench.text, **bench.made),
    "plan": lambda bench, out: spp_export.plan(bench.text, **bench.made),
    "export": lambda bench, out: spp_export.export(bench.text, out / "x", **bench.made),
    "export --plan": lambda bench, out: spp_export.export(
        bench.text, out / "x", plan=bench.plan, **bench.made
    ),
    "export --format onnx": lambda bench, out: spp_export.export(
        bench.text, out / "x", format="onnx", **bench.made
    ),
    "convert": lambda bench, out: spp_export.convert(
        str(bench.slim), out / "x", scenario=bench.text
    ),
    "verify": lambda bench, out: spp_export.verify(bench.slim, scenario=bench.text, **bench.model),
    "verify onnx": lambda bench, out: spp_export.verify(
        bench.onnx, scenario=bench.text, **bench.model
    ),
    "recover --data": lambda bench, out: recover(bench, out, data=bench.text),
    "recover --validation": lambda bench, out: recover(bench, out, validation=bench.text),
    "eval": lambda bench, out: evaluate(bench, out, scenario=bench.text),
    "eval --eval-set": lambda bench, out: evaluate(bench, out, eval_set=[bench.questions]),
    "chat dense": lambda bench, out: spp_export.chat(str(bench.dense)).ask(f"1 + {WORD}"),
    "chat": lambda bench, out: spp_export.chat(bench.slim).ask(f"1 + {WORD}"),
    "chat onnx": lambda bench, out: spp_export.chat(bench.onnx).ask(f"1 + {WORD}"),
    "chat plans": lambda bench, out: spp_export.chat(bench.plan, **bench.made).ask(f"1 + {WORD}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_token_id_and_vocabulary(bench, tmp_path, command):
    with refused(ModelError, MESSAGE):
        COMMANDS[command](bench, tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("x", "recovered")]


def test_a_tokenizer_may_know_more_as_long_as_the_text_does_not(bench):
    assert spp_export.verify(bench.slim, scenario=bench.plain, **bench.model).passed
    chat = spp_export.chat(bench.slim)
    with refused(ModelError, MESSAGE):
        chat.ask(WORD)
    assert chat.ask("1 + 1", max_new_tokens=2).token_ids


def test_gguf_has_as_many_tokens_as_the_model(bench, tmp_path):
    """llama.cpp splits text by itself, so nothing of ours would see the token."""
    dense = add_tokens(add_merges(make_checkpoint(tmp_path, FAMILY, **SIZE)))
    with refused(ModelError, rf"has token '<\|image\|>', which is {VOCAB + 2}, and config.json"):
        spp_export.convert(str(dense), tmp_path / "x", format="gguf")
    assert not (tmp_path / "x").exists()
