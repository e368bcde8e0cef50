"""Answers of a row's model to an evaluation set: its greedy ones, and its loss on the reference
ones.

Each turn follows the right answers to the earlier turns of its conversation, not the model's own:
what the published evaluation feeds back is not known, and a turn's figure then depends on that
turn alone. Greedy without repetition penalty, where the release of SubspacePath Pruner adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import input_device
from spp_export.common.progress import progress
from spp_export.data.conversation import Turn
from spp_export.data.scenario import Scenario
from spp_export.evaluation.bootstrap import array, numbers, weighted_mean
from spp_export.evaluation.harness.answers import (
    DEFAULT_NEW_TOKENS,
    MATCH,
    MULTIPLE_CHOICE,
    keyword_recall,
    option_match,
)
from spp_export.evaluation.harness.measure import Opened, default_batch_tokens
from spp_export.models.stop_tokens import stop_tokens

MAX_PROMPT_TOKENS = 768
# What is counted per conversation, and what it is divided by to give the figure of that name.
FIGURES = {
    "recall": "turns",
    "match": "turns",
    "option": "choices",
    "answer_nll": "answer_tokens",
}


@dataclass(frozen=True)
class Question:
    """One turn with a known answer: prompt_ids end where the model is to go on."""

    conversation: int
    turn: Turn
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The reference answer."""
        return self.turn.answer or ""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one evaluation set."""

    name: str
    questions: tuple[Question, ...]


def question_set(tokenizer: Any, scenario: Scenario) -> QuestionSet:
    """Every turn that has an answer, after the earlier ones of its conversation that have one.

    Prompts are written by the tokenizer's chat template where it has one, else one line each. The
    oldest turns are left out where a prompt would be longer than 768 tokens.
    """
    return QuestionSet(scenario.name, tuple(_questions(tokenizer, scenario)))


def answer_row(
    sets: Sequence[QuestionSet],
    tokenizer: Any,
    opened: Opened,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Per set, for the record: counts per conversation, and each figure with its interval."""
    answers = {}
    total = sum(len(questions.questions) for questions in sets)
    done = 0
    with opened() as model, progress("answering", total) as advance_to:
        for questions in sets:
            prompts = [question.prompt_ids for question in questions.questions]
            responses = generate(
                model,
                prompts,
                max_new_tokens,
                model_stop_tokens(model, tokenizer),
                advance_to=partial(_advance, advance_to, done),
            )
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            answers[questions.name] = _judged(
                questions, texts, answer_nll(model, questions.questions), seed
            )
            done += len(questions.questions)
    return answers


def _advance(advance_to: Callable[[float], None], before: float, done: float) -> None:
    advance_to(before + done)


def model_stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer of a model in memory."""
    loaded: Any = model
    generation = getattr(loaded, "generation_config", None)
    settings = generation.to_dict() if generation else {}
    return frozenset(stop_tokens(settings, loaded.config.to_dict(), tokenizer))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    *,
    batch_tokens: int | None = None,
    advance_to: Callable[[float], None] = lambda done: None,
    with_end: bool = False,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the token that ended it, or `with_end`."""
    size = 4 * default_batch_tokens(input_device(model).type)
    continuations: list[list[int]] = [[] for _ in prompts]
    done = 0
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for rows in _batches(lengths, batch_tokens or size):
        batch = _greedy(model, [prompts[row] for row in rows], max_new_tokens, stop, with_end)
        for row, ids in zip(rows, batch, strict=True):
            continuations[row] = ids
        done += len(rows)
        advance_to(done)
    return continuations


@torch.no_grad()
def _greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    with_end: bool,
) -> list[list[int]]:
    """One batch, padded on the left, so that all rows go on at the same column."""
    device = input_device(model)
    ids, mask = _padded(prompts, left=True)
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(stop), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = None
    made: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        before = finished
        finished = finished | torch.isin(ids[:, 0], ends)
        made.append(ids[:, 0].masked_fill(before if with_end else finished, -1))
        if bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], dim=1)
        positions = positions[:, -1:] + 1
    columns = torch.stack(made, dim=1).tolist() if made else [[] for _ in prompts]
    return [[token for token in row if token >= 0] for row in columns]


@torch.no_grad()
def answer_nll(model: nn.Module, questions: Sequence[Question]) -> list[float]:
    """Negative log-likelihood of each reference answer after its prompt, in nats."""
    device = input_device(model)
    rows = [(*question.prompt_ids, *question.answer_ids) for question in questions]
    losses = [0.0] * len(rows)
    for batch in _batches([len(row) for row in rows], default_batch_tokens(device.type)):
        ids, mask = _padded([rows[index] for index in batch], left=False)
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, index in enumerate(batch):
            first, last = len(questions[index].prompt_ids), len(rows[index])
            log_p = logits[row, first - 1 : last - 1].float().log_softmax(-1)
            losses[index] = -float(log_p.gather(1, ids[row, first:last, None]).double().sum())
    return losses


def _questions(tokenizer: Any, scenario: Scenario) -> Iterator[Question]:
    conversations = groupby(scenario.turns, key=lambda turn: turn.session)
    for conversation, (_, turns) in enumerate(conversations):
        history: list[tuple[str, str]] = []
        for turn in turns:
            if turn.answer is None:
                continue
            prompt = _prompt_ids(tokenizer, history, turn.prompt)
            answer = tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
            if prompt and answer:
                yield Question(conversation, turn, tuple(prompt), tuple(answer))
            history.append((turn.prompt, turn.answer))


def _prompt_ids(tokenizer: Any, history: Sequence[tuple[str, str]], prompt: str) -> list[int]:
    for start in range(len(history) + 1):
        ids = _written(tokenizer, history[start:], prompt)
        if len(ids) <= MAX_PROMPT_TOKENS:
            return ids
    return ids[-MAX_PROMPT_TOKENS:]


def _written(tokenizer: Any, history: Sequence[tuple[str, str]], prompt: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        lines = [f"{question}\n{answer}\n\n" for question, answer in history]
        return list(tokenizer("".join(lines) + prompt + "\n")["input_ids"])
    messages = []
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _judged(
    questions: QuestionSet, responses: Sequence[str], nll: Sequence[float], seed: int
) -> dict[str, Any]:
    counts: dict[int, dict[str, float]] = {}
    for question, response, loss in zip(questions.questions, responses, nll, strict=True):
        recall = keyword_recall(question.answer, response)
        choice = None
        if question.turn.task_type == MULTIPLE_CHOICE:
            choice = option_match(question.turn.prompt, question.answer, response)
        turn = {
            "turns": 1,
            "recall": recall,
            "match": recall >= MATCH,
            "choices": choice is not None,
            "option": bool(choice),
            "answer_tokens": len(question.answer_ids),
            "answer_nll": loss,
        }
        total = counts.setdefault(question.conversation, dict.fromkeys(turn, 0.0))
        for name, value in turn.items():
            total[name] += value
    names = ("turns", "choices", "answer_tokens", *FIGURES)
    lists = {name: numbers(array([total[name] for total in counts.values()])) for name in names}
    summary = {
        figure: numbers(weighted_mean(array(lists[figure]), array(lists[count]), seed).to_list())
        for figure, count in FIGURES.items()
    }
    return {**lists, "summary": summary}


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, at most `batch_tokens` in all with the padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask [B,S] of rows of ids."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask
