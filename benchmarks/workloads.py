"""Requests with drawn lengths and random token ids. One seed gives the same ones everywhere.

Lengths are lognormal, bounded, with the means that the PagedAttention paper states for its two
data sets; which tokens stand in a prompt changes nothing that is measured here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SEED = 7
# Ids below are control tokens in many vocabularies.
FIRST_PLAIN_ID = 10


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of whole numbers: its mean, its spread, and its bounds."""

    mean: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return min(self.high, max(self.low, round(rng.lognormvariate(mu, self.sigma))))


@dataclass(frozen=True, slots=True)
class Shape:
    """A data set, as far as its lengths go."""

    prompt: Lengths
    output: Lengths

    def divided(self, by: int) -> Shape:
        """The same shape with shorter texts, for a small model."""
        return Shape(*(_divided(lengths, by) for lengths in (self.prompt, self.output)))


def _divided(lengths: Lengths, by: int) -> Lengths:
    return Lengths(lengths.mean / by, lengths.sigma, lengths.low // by, lengths.high // by)


SHAREGPT = Shape(Lengths(161, 1.0, 4, 1024), Lengths(338, 0.8, 4, 1024))
ALPACA = Shape(Lengths(19, 0.6, 4, 256), Lengths(58, 0.8, 4, 512))


@dataclass(frozen=True, slots=True)
class Work:
    """One request: the prompt's ids, and how many tokens it draws whatever they are."""

    prompt: list[int]
    output: int


def draw(shape: Shape, count: int, vocab_size: int, seed: int = SEED) -> list[Work]:
    """The first `count` requests of a shape."""
    rng = random.Random(seed)
    lengths = [(shape.prompt.draw(rng), shape.output.draw(rng)) for _ in range(count)]
    return [Work(random_ids(rng, size, vocab_size), output) for size, output in lengths]


def random_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_PLAIN_ID, vocab_size) for _ in range(count)]


def means(work: list[Work]) -> dict[str, float]:
    """What was drawn, for the record."""
    return {
        "requests": len(work),
        "mean_prompt": round(sum(len(w.prompt) for w in work) / len(work), 1),
        "mean_output": round(sum(w.output for w in work) / len(work), 1),
    }
