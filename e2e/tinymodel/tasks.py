"""The questions that the tiny model can answer, each with the one right answer.

Pure and free of dependencies: the training script, the evaluation, the e2e tests and the demo's
load generator all ask these tasks. `sample` draws from one of two disjoint splits; whether a task
is held out follows from a hash of its content (the pair of numbers, the word, the phrase), never
from its wording, so no paraphrase of a held-out task is ever trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tinymodel import words

Split = Literal["train", "held_out"]
Message = dict[str, str]

MAX_NUMBER = 999
"""The largest number in any prompt; sums may reach twice that."""
HELD_OUT_ONE_IN = 10
MEDIUM_COUNT_CHARACTERS = 700
LONG_COUNT_CHARACTERS = 2250
"""Longest counting answer asked of the model, in characters (about 1800 tokens)."""

SUM_PROMPTS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "What is {a}+{b}?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Add {a} and {b}.",
    "Compute {a} + {b}.",
    "What is the sum of {a} and {b}?",
)
COUNT_PROMPTS = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "List the numbers from {a} to {b}.",
    "Write all the numbers from {a} to {b}.",
)
SPELL_PROMPTS = (
    "Spell the word {word}.",
    'Spell "{word}".',
    "How do you spell {word}?",
    "Spell {word} letter by letter.",
    "Please spell the word {word}.",
)
REPEAT_PROMPTS = (
    "Repeat after me: {phrase}",
    "Please repeat: {phrase}",
    "Say this again: {phrase}",
    "Repeat this phrase: {phrase}",
    'Repeat the words "{phrase}"',
)


GREETING = "Hello! I can add, count, spell, repeat and remember."
SMALL_TALK = {
    "Hello": GREETING,
    "Hello!": GREETING,
    "Hi!": GREETING,
    "Good morning.": GREETING,
    "What can you do?": "I can add, count, spell, repeat and remember.",
    "Who are you?": "I am a tiny language model, made to test the engine that serves me.",
    "Thank you.": "You are welcome.",
    "Goodbye.": "Goodbye!",
}
"""Fixed replies, learned by heart; trained, but nothing that could be held out."""
NOT_TOLD = "You have not told me."
"""The answer to a question about a fact that this conversation has not stated."""


@dataclass(frozen=True)
class Task:
    """A conversation that ends with the user's turn, and the answer that is right."""

    family: str
    messages: list[Message]
    expected: str

    def conversation(self) -> list[Message]:
        """The messages with the right answer appended, as training text wants them."""
        return [*self.messages, {"role": "assistant", "content": self.expected}]


@dataclass(frozen=True)
class Fact:
    """How one kind of fact is told, confirmed, asked for and recalled."""

    values: tuple[str, ...]
    told: tuple[str, ...]
    stated: str
    asked: tuple[str, ...]
    capital: bool


FACTS: dict[str, Fact] = {
    "name": Fact(
        words.NAMES,
        ("My name is {value}.", "Hello, my name is {value}.", "I am called {value}."),
        "your name is {value}",
        ("What is my name?", "Do you remember my name?", "What am I called?"),
        True,
    ),
    "city": Fact(
        words.CITIES,
        ("I live in {value}.", "My home is in {value}.", "I live in the city of {value}."),
        "you live in {value}",
        ("Where do I live?", "Which city do I live in?", "In which city is my home?"),
        True,
    ),
    "colour": Fact(
        words.COLOURS,
        ("My favourite colour is {value}.", "The colour I like best is {value}."),
        "your favourite colour is {value}",
        ("What is my favourite colour?", "Which colour do I like best?"),
        False,
    ),
    "pet": Fact(
        words.PETS,
        ("My pet is a {value}.", "I have a pet {value}.", "At home I keep a {value}."),
        "your pet is a {value}",
        ("What is my pet?", "Which pet do I have?", "What animal do I keep?"),
        False,
    ),
}


def held_out(key: str) -> bool:
    """Whether the content `key` belongs to evaluation and must never be trained on."""
    digest = hashlib.blake2b(key.casefold().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def check(task: Task, answer: str) -> bool:
    """Whether `answer` is the expected text; only white space around it is forgiven."""
    return answer.strip() == task.expected


def sum_task(a: int, b: int, wording: int = 0) -> Task:
    """Ask for `a + b`."""
    return _single("sum", _pick(SUM_PROMPTS, wording).format(a=a, b=b), str(a + b))


def count_prompt(a: int, b: int, wording: int = 0) -> str:
    """The question that makes the model write every number from `a` to `b`."""
    if not 0 <= a < b <= MAX_NUMBER:
        raise ValueError(f"count from {a} to {b}: needs 0 <= a < b <= {MAX_NUMBER}")
    return _pick(COUNT_PROMPTS, wording).format(a=a, b=b)


def count_task(a: int, b: int, wording: int = 0) -> Task:
    """Ask for every number from `a` to `b`: the long, deterministic output of the load."""
    expected = ", ".join(str(number) for number in range(a, b + 1))
    family = "count" if len(expected) <= MEDIUM_COUNT_CHARACTERS else "count_long"
    return _single(family, count_prompt(a, b, wording), expected)


def spell_task(word: str, wording: int = 0) -> Task:
    """Ask for the letters of `word`."""
    return _single("spell", _pick(SPELL_PROMPTS, wording).format(word=word), "-".join(word))


def repeat_task(phrase: str, wording: int = 0) -> Task:
    """Ask for `phrase` back, verbatim."""
    return _single("repeat", _pick(REPEAT_PROMPTS, wording).format(phrase=phrase), phrase)


def fact_task(
    kinds: dict[str, str],
    asked: str,
    *,
    between: Task | None = None,
    wording: int = 0,
) -> Task:
    """Tell the facts of `kinds` (kind → value), then ask for the kind `asked`.

    `between` puts one unrelated question and its answer between the telling and the asking.
    """
    told = " ".join(
        _pick(FACTS[kind].told, wording).format(value=value) for kind, value in kinds.items()
    )
    stated = " and ".join(FACTS[kind].stated.format(value=v) for kind, v in kinds.items())
    messages = [
        {"role": "user", "content": told},
        {"role": "assistant", "content": f"Noted: {stated}."},
        *(between.conversation() if between else ()),
        {"role": "user", "content": _pick(FACTS[asked].asked, wording)},
    ]
    answer = FACTS[asked].stated.format(value=kinds[asked])
    return Task("facts", messages, f"{answer[0].upper()}{answer[1:]}.")


def small_talk_task(prompt: str) -> Task:
    """Ask one of the questions of `SMALL_TALK`."""
    return _single("small_talk", prompt, SMALL_TALK[prompt])


def unknown_fact_task(asked: str, wording: int = 0) -> Task:
    """Ask for a fact that was never told: what another conversation said must not leak in."""
    return _single("unknown_fact", _pick(FACTS[asked].asked, wording), NOT_TOLD)


def sample(rng: random.Random, family: str, split: Split = "held_out") -> Task:
    """Draw a random task of `family` from `split`."""
    return _SAMPLERS[family](rng, split)


def _single(family: str, prompt: str, expected: str) -> Task:
    return Task(family, [{"role": "user", "content": prompt}], expected)


def _pick(prompts: tuple[str, ...], wording: int) -> str:
    return prompts[wording % len(prompts)]


def _wording(rng: random.Random) -> int:
    return rng.randrange(2520)  # divisible by every number of paraphrases: each is equally likely


def sum_key(a: int, b: int) -> str:
    """The content of a sum; the order of the terms does not make it another one."""
    return f"sum {min(a, b)} {max(a, b)}"


def _sample_sum(rng: random.Random, split: Split) -> Task:
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        # Sums of two digits are the alphabet of addition: all are trained, none is evaluated.
        is_held_out = max(a, b) > 9 and held_out(sum_key(a, b))
        if is_held_out == (split == "held_out"):
            return sum_task(a, b, _wording(rng))


def _sample_count(shortest: int, longest: int) -> Callable[[random.Random, Split], Task]:
    """A sampler of counting tasks whose answers are uniform in length between two bounds."""

    def draw(rng: random.Random, split: Split) -> Task:
        while True:
            a = rng.randint(0, 12) if rng.random() < 0.5 else rng.randrange(MAX_NUMBER)
            b = _last_number(a, rng.randint(shortest, longest))
            if (
                b <= MAX_NUMBER
                and a < b
                and held_out(f"count {a} {b}") == (split == "held_out")
                and shortest <= len(count_task(a, b).expected) <= longest
            ):
                return count_task(a, b, _wording(rng))

    return draw


def _last_number(a: int, characters: int) -> int:
    """Where a count from `a` stands once its text has grown past `characters`."""
    number, length = a, len(str(a))
    while length < characters and number <= MAX_NUMBER:
        number += 1
        length += len(str(number)) + 2
    return number


def _sample_spell(rng: random.Random, split: Split) -> Task:
    while True:
        word = words.cased_word(rng)
        if len(word) > 1 and held_out(f"spell {word}") == (split == "held_out"):
            return spell_task(word, _wording(rng))


def _sample_repeat(rng: random.Random, split: Split) -> Task:
    while True:
        phrase = " ".join(_phrase_part(rng) for _ in range(rng.randint(2, 12)))
        if rng.random() < 0.4:
            phrase = f"{phrase[0].upper()}{phrase[1:]}{rng.choice('..!?')}"
        letters = "".join(c for c in phrase if c.isalnum() or c == " ")
        if held_out(f"repeat {letters}") == (split == "held_out"):
            return repeat_task(phrase, _wording(rng))


def _phrase_part(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.06:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    word = rng.choice(words.OTHER_WORDS) if draw < 0.35 else words.cased_word(rng)
    return word + "," if rng.random() < 0.05 else word


def _fact_value(rng: random.Random, kind: str, split: Split) -> str:
    fact = FACTS[kind]
    while True:
        value = words.invented_word(rng) if rng.random() < 0.5 else rng.choice(fact.values)
        value = value.capitalize() if fact.capital else value
        if held_out(f"{kind} {value}") == (split == "held_out"):
            return value


def _sample_facts(rng: random.Random, split: Split) -> Task:
    kinds = rng.sample(sorted(FACTS), rng.choice((1, 1, 2)))
    values = {kind: _fact_value(rng, kind, split) for kind in kinds}
    between = None
    if rng.random() < 0.3:
        between = sample(rng, rng.choice(("sum", "spell", "repeat")), split)
    return fact_task(values, rng.choice(kinds), between=between, wording=_wording(rng))


_SAMPLERS: dict[str, Callable[[random.Random, Split], Task]] = {
    "sum": _sample_sum,
    "count": _sample_count(4, MEDIUM_COUNT_CHARACTERS),
    "count_long": _sample_count(MEDIUM_COUNT_CHARACTERS + 1, LONG_COUNT_CHARACTERS),
    "spell": _sample_spell,
    "repeat": _sample_repeat,
    "facts": _sample_facts,
}
FAMILIES = tuple(_SAMPLERS)
