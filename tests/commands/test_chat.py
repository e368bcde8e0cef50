"""`open_chat`: the answers, their text as it streams, and where they end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from factories import CASES, random_layers, shape_of, write_slim
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spp_export import load_slim, open_chat
from spp_export.commands.chat.chat import TextStream
from spp_export.common.errors import ModelError, UsageError
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.write import write_onnx

pytestmark = pytest.mark.thinned(most=3)

CASE = {case.name: case for case in CASES}
EOS, OFFSET = 2, 3
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# What sampling by default, as many models ship it, would change.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.5}


class Scripted:
    """Writes given ids, one after the other, and keeps what it was asked to read."""

    runtime = "script"

    def __init__(self, ids, context_length=1024):
        self.ids = list(ids)
        self.context_length = context_length
        self.sequences = []

    def start(self, capacity):
        sequence = []
        self.sequences.append((capacity, sequence))

        def feed(ids):
            sequence.append(list(ids))
            logits = np.zeros(263, np.float32)
            if not (following := self.ids.pop(0)) >= 0:
                raise KeyboardInterrupt
            logits[following] = 1
            return logits

        return feed


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return CASE["llama-gqa-bias"].make(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def slim(dense, tmp_path_factory):
    layers = random_layers(shape_of(dense), seed=3)
    return write_slim(tmp_path_factory.mktemp("chat") / "slim", dense, layers)


@pytest.fixture(scope="module")
def templated(dense, tmp_path_factory):
    copied = tmp_path_factory.mktemp("chat") / "templated"
    shutil.copytree(dense, copied)
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    return copied


def ids_of(text, *, start=()):
    """By the rule of the factories' tokenizer: one token per byte, in its alphabet's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ((written, _),) = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    return [*start, *(OFFSET + alphabet.index(letter) for letter in written)]


def without_stop(path, ids):
    """What comes before the end, and the end."""
    stop = ids.index(EOS) + 1 if EOS in ids else len(ids)
    return ids[:stop]


def oracle(path, prompt, count):
    """Greedy tokens by transformers' own loop, on the whole sequence again for every token."""
    model = load_slim(path)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return without_stop(path, ids[len(prompt) :])


@pytest.mark.parametrize("name", CASE)
def test_greedy_tokens_are_those_without_a_cache(name, tmp_path):
    path = CASE[name].make(tmp_path)
    answer = open_chat(path).ask("What is an acid?", max_new_tokens=20)
    assert list(answer.prompt_ids) == ids_of("What is an acid?")
    assert list(answer.token_ids) == oracle(path, answer.prompt_ids, 20)


def test_a_slim_model_answers_as_transformers_generates(slim):
    answer = open_chat(slim).ask("What is an acid?", max_new_tokens=20)
    model = AutoModelForCausalLM.from_pretrained(slim)
    given = torch.tensor([answer.prompt_ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=20
    )
    assert list(answer.token_ids) == made[0, given.shape[1] :].tolist()


def test_what_generation_config_says_of_sampling_is_left_alone(dense, tmp_path):
    path = tmp_path / "sampling"
    shutil.copytree(dense, path)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | SAMPLING))
    asked = {"prompt": "What is an acid?", "max_new_tokens": 20}
    assert open_chat(path).ask(**asked).token_ids == open_chat(dense).ask(**asked).token_ids


@pytest.mark.parametrize("attention", ["gqa", "gqa-bias", "standard"])
def test_onnx_and_transformers_say_the_same(slim, tmp_path, attention):
    (tmp_path / "onnx").mkdir()
    write_onnx(slim, tmp_path / "onnx", OnnxOptions(attention=attention))
    chats = [open_chat(path) for path in (slim, tmp_path / "onnx")]
    assert [chat.model.runtime for chat in chats] == ["transformers", "onnxruntime"]
    for prompt in ("What is an acid?", "Salt " * 60):
        ours, theirs = (chat.ask(prompt, max_new_tokens=12) for chat in chats)
        assert ours.token_ids == theirs.token_ids
        assert ours.text == theirs.text


def test_a_long_conversation_on_onnx_goes_on_from_its_cache(templated, tmp_path):
    (tmp_path / "onnx").mkdir()
    write_onnx(templated, tmp_path / "onnx", OnnxOptions())
    chats = [open_chat(path) for path in (templated, tmp_path / "onnx")]
    for prompt in ("Hello", "x" * 300, "And a base?"):
        ours, theirs = (chat.ask(prompt, max_new_tokens=8) for chat in chats)
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.token_ids == theirs.token_ids


def test_the_template_is_given_the_system_and_what_was_said(templated):
    script = ids_of("Hi.")
    model = Scripted([*script, EOS, *script, EOS, *script, EOS])
    chat = open_chat(templated, model=model, system="Be kind.")
    chat.ask("Hello")
    second = chat.ask("Again")
    said = "system:Be kind.\nuser:Hello\nassistant:Hi.\nuser:Again\nassistant:"
    assert list(second.prompt_ids) == ids_of(said)
    chat.reset()
    fresh = chat.ask("Anew")
    assert list(fresh.prompt_ids) == ids_of("system:Be kind.\nuser:Anew\nassistant:")


def test_only_the_new_part_of_a_conversation_is_read(templated):
    script = ids_of("Hi.")
    model = Scripted([*script, EOS] * 3)
    chat = open_chat(templated, model=model)
    for prompt in ("Hello", "Again"):
        chat.ask(prompt, max_new_tokens=9)
    ((_, reads),) = model.sequences
    assert reads[0] == ids_of("user:Hello\nassistant:")
    assert reads[1:4] == [[token] for token in script]
    assert reads[4] == ids_of("\nuser:Again\nassistant:")
    chat.reset()
    chat.ask("Hello", max_new_tokens=9)
    assert len(model.sequences) == 2


def test_a_conversation_that_outgrows_its_room_is_read_again(templated):
    model = Scripted([*ids_of("a"), EOS] * 2)
    chat = open_chat(templated, model=model)
    chat.ask("Hello", max_new_tokens=9)
    answer = chat.ask("x" * 700, max_new_tokens=9)
    (first, _), (second, reads) = model.sequences
    assert first < len(answer.prompt_ids) + 9 <= second <= 1024
    assert reads[0] == list(answer.prompt_ids)


def test_what_a_model_says_after_what_it_said_is_as_if_read_anew(templated):
    chat = open_chat(templated)
    for prompt in ("Hello", "What is an acid?"):
        answer = chat.ask(prompt, max_new_tokens=10)
        assert list(answer.token_ids) == oracle(templated, answer.prompt_ids, 10)


def test_raw_text_is_continued_as_it_is(templated):
    model = Scripted([*ids_of("a"), EOS] * 2)
    chat = open_chat(templated, model=model, raw=True)
    for prompt in ("Once upon a", "time"):
        assert list(chat.ask(prompt).prompt_ids) == ids_of(prompt)


def test_the_text_comes_in_whole_characters(dense):
    text = "Säure: H₂O → 日本 🙂 end"
    pieces = []
    answer = open_chat(dense, model=Scripted([*ids_of(text), EOS])).ask("?", show=pieces.append)
    assert "".join(pieces) == answer.text == text
    assert [piece for piece in pieces if piece] == list(text)
    assert answer.ending == "end"
    assert answer.token_ids[-1] == EOS


def test_a_character_cut_at_the_end_is_shown_as_such(dense):
    ids = ids_of("aé")
    answer = open_chat(dense, model=Scripted(ids)).ask("?", max_new_tokens=2)
    assert answer.text == "a\N{REPLACEMENT CHARACTER}"
    assert answer.ending == "length"


def test_ids_beyond_the_tokenizer_and_special_ones_are_not_text(dense):
    unknown, special = 261, 259
    script = [unknown, *ids_of("a"), special, *ids_of("b"), EOS]
    assert open_chat(dense, model=Scripted(script)).ask("?").text == "ab"


def test_words_with_their_leading_space_join_as_they_decode():
    vocab = {"<unk>": 0, "▁An": 1, "▁acid": 2, ".": 3, "▁": 4, "s": 5}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in (1, 2, 5, 4, 3)] == ["An", " acid", "s", " ", "."]
    assert stream.rest() == ""
    assert stream.text == tokenizer.decode([1, 2, 5, 4, 3]) == "An acids ."


@pytest.mark.parametrize("listed", [65, [65, 70], None])
def test_every_id_that_ends_an_answer_does(dense, tmp_path, listed):
    path = tmp_path / "ends"
    shutil.copytree(dense, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    stops = {EOS} | (set(listed) if isinstance(listed, list) else {listed} - {None})
    assert open_chat(path, model=Scripted([])).stop == stops


def test_without_generation_config_the_models_own_says_what_ends(dense, tmp_path):
    path = tmp_path / "plain"
    shutil.copytree(dense, path)
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 77}))
    assert open_chat(path, model=Scripted([])).stop == {EOS, 77}


class OwnTokens(Scripted):
    """Reads every text as the same ids, as an engine with a tokenizer of its own may."""

    def tokenize(self, text, *, around, capacity):
        self.texts = [*getattr(self, "texts", []), (text, around, capacity)]
        return [7, 8, 9]


@pytest.mark.parametrize("raw", [False, True])
def test_an_engine_with_a_tokenizer_reads_what_its_users_write(templated, raw):
    model = OwnTokens([EOS])
    answer = open_chat(templated, model=model, raw=raw).ask("Why?")
    assert answer.prompt_ids == (7, 8, 9)
    assert model.sequences[0][1] == [[7, 8, 9]]
    text, around, capacity = model.texts[0]
    assert text == ("Why?" if raw else "user:Why?\nassistant:")
    assert (around, capacity) == (raw, 512)


def test_such_an_engine_may_need_more_room_than_there_is(dense):
    model = OwnTokens([EOS], context_length=3)
    with pytest.raises(UsageError, match="3 tokens with what was said before"):
        open_chat(dense, model=model).ask("a")


def test_the_context_ends_an_answer(dense):
    model = Scripted([50] * 20, context_length=12)
    answer = open_chat(dense, model=model).ask("x" * 8, max_new_tokens=100)
    assert (answer.ending, len(answer.token_ids)) == ("context", 4)
    assert model.sequences[0][0] == 12


def test_a_prompt_that_fills_the_context_is_refused_and_forgotten(templated):
    model = Scripted([*ids_of("a"), EOS], context_length=40)
    chat = open_chat(templated, model=model)
    with pytest.raises(UsageError, match=r"^116 tokens .* context is 40"):
        chat.ask("x" * 100)
    assert list(chat.ask("Hello").prompt_ids) == ids_of("user:Hello\nassistant:")


def test_an_interruption_ends_the_answer_and_not_the_conversation(templated):
    model = Scripted([*ids_of("ab"), -1, *ids_of("c"), EOS])
    chat = open_chat(templated, model=model)
    answer = chat.ask("Hello")
    assert (answer.text, answer.ending) == ("ab", "interrupted")
    second = chat.ask("Again")
    assert list(second.prompt_ids) == ids_of("user:Hello\nassistant:ab\nuser:Again\nassistant:")
    # what the interrupted step left in the cache is not built upon
    assert model.sequences[1][1][0] == list(second.prompt_ids)


def test_an_interruption_before_the_first_token(dense):
    answer = open_chat(dense, model=Scripted([-1])).ask("?")
    assert (answer.text, answer.token_ids, answer.ending) == ("", (), "interrupted")
    assert answer.first_token_seconds is None
    assert answer.tokens_per_second is None


def test_figures_of_an_answer(dense):
    answer = open_chat(dense).ask("What is an acid?", max_new_tokens=4)
    assert 0 < answer.first_token_seconds < answer.seconds
    rest = answer.seconds - answer.first_token_seconds
    assert answer.tokens_per_second == pytest.approx((len(answer.token_ids) - 1) / rest)
    assert json.loads(json.dumps(answer.to_dict()))["token_ids"] == list(answer.token_ids)


def test_a_model_that_overflows_says_so(dense):
    class Broken(Scripted):
        def start(self, capacity):
            return lambda ids: np.full(263, np.nan, np.float32)

    with pytest.raises(ModelError, match="not numbers"):
        open_chat(dense, model=Broken([])).ask("?")


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "prompt is empty"), ("caf\udce9", "not UTF-8")]
)
def test_prompts_that_cannot_be_asked(dense, prompt, message):
    with pytest.raises(UsageError, match=message):
        open_chat(dense, model=Scripted([])).ask(prompt)


def test_a_template_that_refuses(templated, tmp_path):
    path = tmp_path / "strict"
    shutil.copytree(templated, path)
    (path / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(UsageError, match="refuses this conversation: no system role"):
        open_chat(path, model=Scripted([]), system="Be kind.").ask("?")


@pytest.mark.parametrize(
    ("where", "raw", "reason"), [("templated", True, "--raw"), ("dense", False, "has none")]
)
def test_a_system_needs_a_template(request, where, raw, reason):
    with pytest.raises(UsageError, match=reason):
        open_chat(request.getfixturevalue(where), model=Scripted([]), system="Be", raw=raw)


def test_what_is_no_model(tmp_path, dense):
    with pytest.raises(UsageError, match="no such directory"):
        open_chat(tmp_path / "nowhere")
    with pytest.raises(
        UsageError, match=r"no model.*\*\.safetensors or model\.onnx or model\.gguf"
    ):
        open_chat(tmp_path)
    with pytest.raises(UsageError, match="got a file"):
        open_chat(dense / "config.json")
    file = tmp_path / "model.gguf"
    file.touch()
    for place in (tmp_path, file):
        with pytest.raises(UsageError, match="the directories that spp wrote"):
            open_chat(place)


def test_options_that_do_not_fit(dense, tmp_path):
    with pytest.raises(UsageError, match="--device toaster: expected cpu"):
        open_chat(dense, device="toaster")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UsageError, match=r"--dtype float32: .* is an ONNX graph"):
        open_chat(tmp_path, dtype="float32")


def test_a_directory_without_a_tokenizer(dense, tmp_path):
    path = tmp_path / "mute"
    shutil.copytree(dense, path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        open_chat(path, model=Scripted([]))
