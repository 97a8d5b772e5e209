"""The prefix cache on the tiny model: what it costs where nothing hits, what it gains at 90 %."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

from record import ROOT, ROUNDS, Figure, Part, interleaved, median_ratio, timed
from workloads import SEED, random_ids

from octavo import LLM, SamplingParams
from octavo.config import default_threads

MODEL = ROOT / "e2e" / "tinymodel" / "model"
VOCAB_SIZE = 768
PROMPT, OUTPUT = 1024, 16
BLOCK_SIZE = 16
# Of the prompt's blocks; whole ones, as only whole ones are found.
HIT_SHARE = 0.9
# Few, so that blocks are evicted, as in a long run, and none is touched for the first time
# while it is timed.
NUM_BLOCKS = 512
# A difference of a hundredth takes more looks than the others.
LOOKS = 3 * ROUNDS


# Enough that no block has to be used again: each is touched for the first time.
UNTOUCHED_BLOCKS = 8192


def make(num_blocks: int, *, cached: bool) -> LLM:
    """An engine of its own."""
    return LLM(
        str(MODEL),
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        enable_prefix_caching=cached,
        num_threads=default_threads(),
    )


def prompts(rng: random.Random, count: int, common: list[int]) -> list[list[int]]:
    """Prompts with the same beginning and ends of their own."""
    return [common + random_ids(rng, PROMPT - len(common), VOCAB_SIZE) for _ in range(count)]


class Run:
    """One engine's turn on its own copy of an endless series of new prompts."""

    def __init__(self, llm: LLM, series: Iterator[list[list[int]]]) -> None:
        self._llm = llm
        self._series = series
        self._params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True)
        self.asked = self.found = 0

    def __call__(self) -> float:
        batch = next(self._series)
        results = []
        seconds = timed(
            lambda: results.extend(self._llm.generate(batch, self._params, use_tqdm=False))
        )
        self.asked += sum(len(one) for one in batch)
        self.found += sum(result.num_cached_tokens for result in results)
        return seconds


def prefix(requests: int) -> Part:
    """With the cache and without, on the same prompts in turns."""
    plain, cached = make(NUM_BLOCKS, cached=False), make(NUM_BLOCKS, cached=True)
    part = Part("prefix", details={"prompt": PROMPT, "output": OUTPUT, "requests": requests})
    part.details |= {"rounds": LOOKS, "num_blocks": NUM_BLOCKS, "model": "e2e/tinymodel/model"}
    for name, hits in (("no_hits", 0.0), ("hits", HIT_SHARE)):
        warm_up = 1 + 2 * NUM_BLOCKS * BLOCK_SIZE // (requests * PROMPT)
        found, share = _compare(plain, cached, requests, hits, warm_up, LOOKS)
        if hits:
            gain = median_ratio(found["plain"], found["cached"])
            part.figures.append(Figure(f"gain at {share:.0%} hits", gain, "times", 2.5, "higher"))
        else:
            cost = median_ratio(found["cached"], found["plain"]) - 1
            part.figures.append(Figure(f"cost at {share:.0%} hits", cost, "", 0.01))
        part.details[name] = _details(found, share)
    plain, cached = make(UNTOUCHED_BLOCKS, cached=False), make(UNTOUCHED_BLOCKS, cached=True)
    few = min(requests, UNTOUCHED_BLOCKS * BLOCK_SIZE // (PROMPT + OUTPUT) // (LOOKS + 2))
    found, share = _compare(plain, cached, few, 0.0, 1, LOOKS)
    cost = median_ratio(found["cached"], found["plain"]) - 1
    part.figures.append(Figure("the same while the pool is filled the first time", cost, ""))
    part.details["no_hits_first_fill"] = _details(found, share)
    return part


def _details(found: dict[str, list[float]], share: float) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(found["cached"], found["plain"], strict=True)]
    return {
        "hit_share": round(share, 4),
        "seconds": {side: round(statistics.median(times), 4) for side, times in found.items()},
        "cached_to_plain_by_round": [round(ratio, 4) for ratio in ratios],
    }


def _compare(
    plain: LLM, cached: LLM, requests: int, hits: float, warm_up: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    rng = random.Random(SEED)
    blocks = math.ceil(hits * PROMPT / BLOCK_SIZE)
    common = random_ids(rng, blocks * BLOCK_SIZE, VOCAB_SIZE)
    series = (prompts(rng, requests, common) for _ in itertools.count())
    ours, others = itertools.tee(series)
    runs = {"plain": Run(plain, others), "cached": Run(cached, ours)}
    for run in runs.values():
        for _ in range(warm_up):
            run()
        run.asked = run.found = 0
    found = interleaved(runs, rounds)
    return found, runs["cached"].found / runs["cached"].asked
