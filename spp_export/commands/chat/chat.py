"""`chat`: a conversation with a model on disk, in whichever format it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spp_export.commands.chat.reader import Reader
from spp_export.commands.requests import DEFAULT_NEW_TOKENS, ChatRequest
from spp_export.common.errors import CheckpointError, UsageError, reason_of
from spp_export.common.options import command
from spp_export.common.progress import progress
from spp_export.formats.format import Format, ReadsText, RunningModel
from spp_export.formats.registry import FORMATS, detect_format
from spp_export.formats.sampling import Chooser, Sampling, greedy
from spp_export.models.checkpoint.checkpoint import CONFIG_NAME, read_config
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.checkpoint.reader import nothing_to_read
from spp_export.models.dequantise import find_model
from spp_export.models.hub import DEMO, demo_model
from spp_export.models.stop_tokens import stop_tokens
from spp_export.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from spp_export.commands.load import ScenarioModels

# Why an answer ended: the model ended it, it has all tokens that were asked for, the context is
# full, or the user interrupted it.
Ending = Literal["end", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    prompt_ids     everything it read: earlier turns and the chat template's words included
    token_ids      what it wrote, with the token that ended the answer, if one did
    text           the same as text, without special tokens
    seconds        from the question to the end; first_token_seconds to the first token
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ending: Ending
    first_token_seconds: float | None
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None where there was no second."""
        if self.first_token_seconds is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.seconds - self.first_token_seconds)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "prompt": self.prompt,
            "answer": self.text,
            "prompt_token_ids": list(self.prompt_ids),
            "token_ids": list(self.token_ids),
            "ending": self.ending,
            "timings": {
                "first_token_seconds": self.first_token_seconds,
                "seconds": self.seconds,
                "tokens_per_second": self.tokens_per_second,
            },
        }


class Chat:
    """A model, its tokenizer and the conversation so far.

    model   the runtime behind it
    stop    ids that end an answer
    raw     prompts are continued as they are, each by itself: asked for, or no chat template
    choose, max_new_tokens  how tokens are taken, and how many, where `ask` is told nothing else
    """

    def __init__(
        self,
        model: RunningModel,
        tokenizer: Any,
        stop: frozenset[int],
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> None:
        templated = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and (raw or not templated):
            reason = "--raw leaves it out" if raw else "this model's tokenizer has none"
            raise UsageError(f"--system is written by the chat template, and {reason}. Drop it.")
        self.choose: Chooser = greedy
        self.max_new_tokens = DEFAULT_NEW_TOKENS
        self.model = model
        self.stop = stop
        self.raw = raw or not templated
        self._tokenizer = tokenizer
        self._reader = Reader(model)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._turns = []

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        choose: Chooser | None = None,
        show: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """The model's answer, told to `show` piece by piece as it comes.

        `choose` takes the next token from logits [1,V]. KeyboardInterrupt ends the answer where it
        is; the conversation can go on after it.

        Raises UsageError, and leaves the conversation as it was, for a prompt that leaves no room
        in the model's context or cannot be written as tokens.
        """
        began = perf_counter()
        choose = choose or self.choose
        most = max_new_tokens or self.max_new_tokens
        text = self._text(prompt)
        ids = self._ids(text)
        limit = min(most, self._room(ids))
        stream = TextStream(self._tokenizer)
        made: list[int] = []
        first: float | None = None
        ending: Ending
        try:
            if isinstance(self.model, ReadsText):
                capacity = self._reader.capacity(len(ids) + limit)
                ids = self.model.tokenize(text, around=self.raw, capacity=capacity)
                limit = min(most, self._room(ids))
            logits = self._reader.prompt(ids, limit)
            while True:
                made.append(_chosen(choose, logits))
                first = first or perf_counter() - began
                if made[-1] in self.stop:
                    ending = "end"
                    break
                show(stream.add(made[-1]))
                if len(made) == limit:
                    ending = "length" if limit == most else "context"
                    break
                logits = self._reader.more(made[-1:])
        except KeyboardInterrupt:
            ending = "interrupted"
            self._reader.forget()
        show(stream.rest())
        self._turns.append({"role": "user", "content": prompt})
        self._turns.append({"role": "assistant", "content": stream.text})
        seconds = perf_counter() - began
        return Answer(prompt, stream.text, tuple(ids), tuple(made), ending, first, seconds)

    def _text(self, prompt: str) -> str:
        """What the model reads."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError("the prompt is not UTF-8 text.") from None
        if not self.raw and not prompt.strip():
            raise _empty()
        return prompt if self.raw else self._templated(prompt)

    def _ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=self.raw)["input_ids"])
        if not ids:
            raise _empty()
        return ids

    def _room(self, ids: Sequence[int]) -> int:
        """How many tokens can follow; UsageError where it is none."""
        room = self.model.context_length - len(ids)
        if room < 1:
            raise UsageError(
                f"{len(ids)} tokens with what was said before, and the model's context is "
                f"{self.model.context_length}. Shorten the prompt, or start afresh with /reset."
            )
        return room

    def _templated(self, prompt: str) -> str:
        messages = [*self._system, *self._turns, {"role": "user", "content": prompt}]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the model's makers
            raise UsageError(
                f"the model's chat template refuses this conversation: {reason_of(error)}. "
                "Leave out --system, or use --raw."
            ) from error
        return text


def _empty() -> UsageError:
    return UsageError("the prompt is empty. Give the model something to go on from.")


@command(ChatRequest)
def chat(request: ChatRequest) -> Chat | ScenarioChat:
    """Open a conversation with an export, a dense model's directory or `demo`, or with whichever
    of several plans or exports the first turn picks.

    `ask` answers, by the temperature, seed and length that this is given. Raises what `open_chat`
    and `load_many` do.

        print(spp_export.chat("out/chemistry").ask("What is an acid?").text)
    """
    share = 1.0 if request.top_p is None else request.top_p
    one = len(request.out) == 1 and Path(request.out[0]).suffix != ".json"
    choose = Sampling(request.temperature, request.top_k or 0, share, request.seed)
    first = Path(request.out[0])
    if one and request.dequantize:
        first = find_model(os.fspath(first), dequantize=True).path
    opened: Chat | ScenarioChat
    how: dict[str, Any] = {
        name: getattr(request, name) for name in ("device", "dtype", "threads", "system", "raw")
    }
    if not one:
        opened = open_scenario_chat(
            request.out,
            model=request.model,
            artifacts=request.artifacts,
            dequantize=request.dequantize,
            **how,
        )
    else:
        opened = open_chat(first, **how)
    opened.choose = choose
    opened.max_new_tokens = request.max_new_tokens
    return opened


def open_chat(
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    system: str | None = None,
    raw: bool = False,
    model: RunningModel | None = None,
) -> Chat:
    """A chat with an export, a dense model's directory, or `demo`.

    directory  one with model.onnx runs on ONNX Runtime, one with safetensors on transformers
    dtype      of transformers: float32 on the CPU by default, else the stored one
    threads    of the CPU; for transformers this is set for the whole process
    system     what the chat template puts before the conversation
    raw        continue every prompt as it is, without template and history
    model      runs instead of the directory's own, whose tokenizer it gets

    Raises UsageError where the directory holds no model that can be run here, ModelError where it
    has no tokenizer or its weights are damaged.
    """
    path = _find(directory)
    with progress("loading the model", None):
        if model is None:
            made = _format(path)
            model = made.run(path, device=device, dtype=dtype, threads=threads)
        tokenizer = load_tokenizer(path, without_torch=True)
    generation = companion_object(path, GENERATION_CONFIG)
    stop = frozenset(stop_tokens(generation, read_config(path), tokenizer))
    return Chat(model, tokenizer, stop, system=system, raw=raw)


def _find(directory: str | os.PathLike[str]) -> Path:
    if os.fspath(directory) == DEMO and not Path(DEMO).is_dir():
        return demo_model()
    path = Path(directory)
    if path.is_dir():
        return path
    if path.exists():
        formats = (made for made in FORMATS.values() if made.holds([path.name]))
        raise next(formats, FORMATS["safetensors"]).refuse(path)
    raise UsageError(
        f"{path}: no such directory. Give a directory that 'spp export' wrote, a dense model's, or "
        "'demo'."
    )


def _format(directory: Path) -> Format[Any]:
    """The format of what is in a directory. Raises UsageError where that is no model."""
    made = detect_format(directory)
    if made is None and (directory / CONFIG_NAME).exists():
        raise CheckpointError(nothing_to_read(directory))
    if made is None:
        files = " or ".join(made.marker or made.weights for made in FORMATS.values())
        raise UsageError(
            f"{directory}: holds no model; expected {files}. Give a directory that 'spp export' "
            "wrote, or a dense model's."
        )
    return made


def _chosen(choose: Chooser, logits: NDArray[Any]) -> int:
    return int(choose(np.asarray(logits, dtype=np.float32)[None])[0])


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of tokens, in pieces that join to the text of the whole.

    What a token adds depends on those before it (decoders drop the space that begins a text, and
    spread characters over tokens). So the tokens since the last whole piece are decoded with and
    without the new one, and the difference is told once it ends in no half character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._told = 0
        self.text = ""

    def add(self, token: int) -> str:
        """The text that this token completes; empty while there is none."""
        self._ids.append(token)
        return self._tell(unfinished=False)

    def rest(self) -> str:
        """The text held back so far; incomplete characters become replacement characters."""
        return self._tell(unfinished=True)

    def _tell(self, *, unfinished: bool) -> str:
        before = self._decode(self._ids[self._context : self._told])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(_INCOMPLETE) and not unfinished):
            return ""
        self._context, self._told = self._told, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class ScenarioChat:
    """A chat per scenario over one set of weights.

    chosen  the scenario that answers; None before the first turn
    choose, max_new_tokens  as of `Chat`
    """

    def __init__(self, models: ScenarioModels, open_model: Callable[[str], Chat]) -> None:
        self.choose: Chooser = greedy
        self.max_new_tokens = DEFAULT_NEW_TOKENS
        self.chosen: str | None = None
        self._models, self._open_model = models, open_model
        # Any will do to see what all have in common.
        self._chat = open_model(next(iter(models)))

    @property
    def model(self) -> RunningModel:
        """The runtime behind the answers."""
        return self._chat.model

    @property
    def raw(self) -> bool:
        """Whether prompts are continued as they are."""
        return self._chat.raw

    def reset(self) -> None:
        """Forget the conversation; the next turn chooses a model again."""
        self.chosen = None

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        choose: Chooser | None = None,
        show: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """As `Chat.ask`; the first turn sets `chosen`."""
        if self.chosen is None:
            self.chosen = self._models.pick(prompt)
            self._chat = self._open_model(self.chosen)
        return self._chat.ask(
            prompt,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            choose=choose or self.choose,
            show=show,
        )


def open_scenario_chat(
    plans: Sequence[str | os.PathLike[str]],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    system: str | None = None,
    raw: bool = False,
    dequantize: bool = False,
) -> ScenarioChat:
    """A chat with the slim models of plans, or of exports' plans, made of one dense model.

    Arguments and errors as of `load_many` and `open_chat`.
    """
    # With PyTorch, which a chat with a graph does without.
    from spp_export.commands.load import load_many
    from spp_export.formats.safetensors.run import TorchModel

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if dtype is None and device == "cpu":
        dtype = "float32"
    models = load_many(
        model, plans, artifacts=artifacts, device=device, dtype=dtype, dequantize=dequantize
    )

    def open_model(name: str) -> Chat:
        runs = TorchModel(models[name])
        return open_chat(models.session.source.path, model=runs, system=system, raw=raw)

    return ScenarioChat(models, open_model)
