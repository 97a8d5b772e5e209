"""Output tokens a second beside transformers, each of its two ways at its best settings."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import transformers
from peers import PAGE_SIZE, Contender, Continuous, Octavo, Static, has_psutil, load
from prefix import MODEL, VOCAB_SIZE
from record import ROUNDS, Figure, Part, interleaved, median_ratio, timed
from workloads import SEED, SHAREGPT, Work, draw, means

from octavo.config import default_threads

DIVIDED_BY = 4
BATCHES = (1, 4, 8, 16, 32, 64)
NUM_BLOCKS = (256, 1024, 4096)
BATCH_TOKENS = (64, 256, 1024)
WARM_UP = 4


def throughput(requests: int) -> Part:
    """Find the peers' best settings by one run each, then measure all three in turns."""
    work = draw(SHAREGPT.divided(DIVIDED_BY), requests, VOCAB_SIZE, SEED)
    tokens = sum(one.output for one in work)
    model, paged_model = load(MODEL), load(MODEL)
    with ExitStack() as stack:
        static, static_rows = _best_static(model, work)
        settings, paged_rows = _best_continuous(paged_model, work)
        contenders: dict[str, Contender] = {
            "octavo": Octavo(MODEL, default_threads()),
            "generate": static,
            "generate_batch": stack.enter_context(Continuous(paged_model, **settings)),
        }
        texts = {name: run(work[:WARM_UP]) for name, run in contenders.items()}
        turns: dict[str, Callable[[], float]] = {
            name: partial(_turn, name, run, work, texts) for name, run in contenders.items()
        }
        seconds = interleaved(turns)
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    ours = seconds["octavo"]
    figures = [
        Figure("octavo", rates["octavo"], "tokens/s"),
        Figure("transformers generate, best batch", rates["generate"], "tokens/s"),
        Figure("transformers generate_batch, best settings", rates["generate_batch"], "tokens/s"),
        _ratio("octavo / generate", seconds["generate"], ours, 4.0),
        _ratio("octavo / generate_batch", seconds["generate_batch"], ours, 1.5),
    ]
    details: dict[str, Any] = means(work) | {
        "output_tokens": tokens,
        "seed": SEED,
        "model": "e2e/tinymodel/model",
        "transformers": transformers.__version__,
        "psutil": has_psutil(),
        "page_size": PAGE_SIZE,
        "rounds": ROUNDS,
        "generate_sweep": static_rows,
        "generate_batch_sweep": paged_rows,
        "seconds_by_round": {n: [round(v, 3) for v in values] for n, values in seconds.items()},
        "requests_with_equal_tokens": {
            name: sum(a == b for a, b in zip(texts["octavo"], texts[name], strict=True))
            for name in ("generate", "generate_batch")
        },
    }
    return Part("throughput", figures, details)


def _ratio(name: str, theirs: list[float], ours: list[float], bar: float) -> Figure:
    return Figure(name, median_ratio(theirs, ours), "times", bar, "higher")


def _turn(name: str, run: Contender, work: list[Work], texts: dict[str, list[list[int]]]) -> float:
    def whole() -> None:
        texts[name] = run(work)

    return timed(whole)


def _best_static(model: Any, work: list[Work]) -> tuple[Static, list[dict[str, Any]]]:
    tokens = sum(one.output for one in work)
    rows, runs = [], {}
    for batch in sorted({min(batch, len(work)) for batch in BATCHES}):
        runs[batch] = run = Static(model, batch)
        run(work[:WARM_UP])
        rate = tokens / timed(partial(run, work))
        rows.append({"batch": batch, "tokens_per_s": round(rate, 1)})
        print(f"  generate, batch {batch:>4}: {rate:8.1f} tokens/s", flush=True)
    return runs[_best(rows)["batch"]], rows


def _best_continuous(model: Any, work: list[Work]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tokens = sum(one.output for one in work)
    rows: list[dict[str, Any]] = []

    def attempt(num_blocks: int, max_batch_tokens: int, share_blocks: bool) -> None:
        with Continuous(model, num_blocks, max_batch_tokens, share_blocks=share_blocks) as run:
            run(work[:WARM_UP])
            rate = tokens / timed(partial(run, work))
        settings = {
            "num_blocks": num_blocks,
            "max_batch_tokens": max_batch_tokens,
            "share_blocks": share_blocks,
        }
        rows.append(settings | {"tokens_per_s": round(rate, 1)})
        print(f"  generate_batch, {settings}: {rate:8.1f} tokens/s", flush=True)

    for num_blocks, max_batch_tokens in itertools.product(NUM_BLOCKS, BATCH_TOKENS):
        attempt(num_blocks, max_batch_tokens, True)
    best = _best(rows)
    attempt(best["num_blocks"], best["max_batch_tokens"], False)
    best = dict(_best(rows))
    del best["tokens_per_s"]
    return best, rows


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["tokens_per_s"])
