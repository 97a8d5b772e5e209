"""Training batches: generated conversations as token ids, with loss on the answers only."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from tinymodel import tasks, text

IGNORED = -100
"""The label of a token that carries no loss, as cross_entropy names it by default."""
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a friendly bot.")
MEDIUM_LENGTH = 640
SHORT_WEIGHTS = {"sum": 9, "count": 2, "spell": 3, "repeat": 3, "facts": 3}

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BatchShape:
    """How many conversations of up to how many tokens."""

    rows: int
    length: int


class Corpus(Dataset[tuple[Batch, Batch]]):
    """Step number → a batch of short conversations and one of long ones.

    Every step seeds its own generator, so the data do not depend on how many workers make them.
    Long steps take turns: several questions in one conversation, then counts to the context's end.
    """

    def __init__(
        self, tokenizer: Tokenizer, seed: int, steps: int, short: BatchShape, long_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._steps = steps
        self._short = short
        self._medium = BatchShape(max(1, long_tokens // MEDIUM_LENGTH), MEDIUM_LENGTH)
        self._long = BatchShape(max(1, long_tokens // text.CONTEXT_LENGTH), text.CONTEXT_LENGTH)
        header = tokenizer.encode("assistant\n", add_special_tokens=False).ids
        self._header = [tokenizer.token_to_id(text.TURN), *header]
        self._turn_end = tokenizer.token_to_id(text.TURN_END)
        self._pad = tokenizer.token_to_id(text.END)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        if step >= self._steps:
            raise IndexError(step)
        rng = random.Random(f"corpus {self._seed} {step}")
        short = self._batch(rng, self._short, short_conversation)
        if step % 2:
            return short, self._batch(rng, self._medium, mixed_conversation)
        return short, self._batch(rng, self._long, long_conversation)

    def _batch(
        self,
        rng: random.Random,
        shape: BatchShape,
        draw: Callable[[random.Random], list[tasks.Message]],
    ) -> Batch:
        ids = torch.full((shape.rows, shape.length), self._pad, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        row = 0
        while row < shape.rows:
            drawn = [text.render(draw(rng)) for _ in range(shape.rows - row)]
            for encoding in self._tokenizer.encode_batch_fast(drawn, add_special_tokens=False):
                tokens = encoding.ids
                if len(tokens) > shape.length:
                    continue  # drawn again: cutting it would train an answer without its end
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, : len(tokens)] = torch.tensor(self._labels(tokens))
                row += 1
        return ids, labels

    def _labels(self, tokens: list[int]) -> list[int]:
        """The tokens of the assistant's turns, their end included; everything else ignored."""
        labels = [IGNORED] * len(tokens)
        width = len(self._header)
        for start, token in enumerate(tokens):
            if token == self._header[0] and tokens[start : start + width] == self._header:
                first = start + width
                last = tokens.index(self._turn_end, first)
                labels[first : last + 1] = tokens[first : last + 1]
        return labels


def _with_system(rng: random.Random, messages: list[tasks.Message]) -> list[tasks.Message]:
    if rng.random() < 0.8:
        return messages
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]


def short_conversation(rng: random.Random) -> list[tasks.Message]:
    """One question of any family; sums, the hardest, most often."""
    if rng.random() < 0.03:
        return _with_system(rng, _without_split(rng).conversation())
    (family,) = rng.choices(list(SHORT_WEIGHTS), list(SHORT_WEIGHTS.values()))
    if family == "count":
        messages = short_count(rng).conversation()
    else:
        messages = tasks.sample(rng, family, "train").conversation()
    if family != "repeat" and rng.random() < 0.15:
        messages = [_casual(rng, message) for message in messages]
    return _with_system(rng, messages)


def _without_split(rng: random.Random) -> tasks.Task:
    if rng.random() < 0.5:
        return tasks.small_talk_task(rng.choice(list(tasks.SMALL_TALK)))
    return tasks.unknown_fact_task(rng.choice(list(tasks.FACTS)), rng.randrange(6))


def _casual(rng: random.Random, message: tasks.Message) -> tasks.Message:
    """The user's turn as people type it: without the capital, or without the full stop."""
    content = message["content"]
    if message["role"] != "user" or len(content) < 2 or ": " in content:
        return message
    if rng.random() < 0.6:
        content = content[0].lower() + content[1:]
    if rng.random() < 0.6:
        content = content.rstrip(".?")
    return {**message, "content": content}


def short_count(rng: random.Random) -> tasks.Task:
    """A count of two to a dozen numbers: what most of the ends and beginnings look like."""
    while True:
        a = rng.randrange(tasks.MAX_NUMBER)
        b = a + rng.randint(1, 12)
        if b <= tasks.MAX_NUMBER and not tasks.held_out(f"count {a} {b}"):
            return tasks.count_task(a, b, rng.randrange(len(tasks.COUNT_PROMPTS)))


def mixed_conversation(rng: random.Random) -> list[tasks.Message]:
    """One to four questions in a row, so that an answer may depend on an earlier turn or not."""
    families = [family for family in tasks.FAMILIES if family != "count_long"]
    messages: list[tasks.Message] = []
    for _ in range(rng.randint(1, 4)):
        messages += tasks.sample(rng, rng.choice(families), "train").conversation()
    return _with_system(rng, messages)


def long_conversation(rng: random.Random) -> list[tasks.Message]:
    """Mostly one count that fills up to the whole context; else several questions and a count."""
    if rng.random() < 0.75:
        return _with_system(rng, tasks.sample(rng, "count_long", "train").conversation())
    return [*mixed_conversation(rng), *tasks.sample(rng, "count", "train").conversation()]
