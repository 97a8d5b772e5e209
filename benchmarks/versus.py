"""Output tokens a second beside transformers, each of its two ways at its best settings."""

from __future__ import annotations

import itertools
import statistics
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
    tokens, threads = sum(one.output for one in work), default_threads()
    model, paged_model = load(MODEL), load(MODEL)
    static, static_rows = _best_static(model, work)
    settings, paged_rows = _best_continuous(paged_model, work)
    octavo = Octavo(MODEL, threads)
    texts: dict[str, list[list[int]]] = {}

    def turn(name: str, run: Contender) -> float:
        run(work[:WARM_UP])
        return timed(lambda: texts.update({name: run(work)}))

    def continuous() -> float:
        # A manager that waits for work slows all others down: it is here for its turn only.
        with Continuous(paged_model, **settings) as run:
            return turn("generate_batch", run)

    seconds = interleaved(
        {
            "octavo": partial(turn, "octavo", octavo),
            "generate": partial(turn, "generate", static),
            "generate_batch": continuous,
        }
    )
    ours = seconds["octavo"]
    figures = [Figure("octavo", tokens / statistics.median(ours), "tokens/s")]
    for name, sweep, bar in (
        ("generate", static_rows, 4.0),
        ("generate_batch", paged_rows, 1.5),
    ):
        theirs = seconds[name]
        fastest = max(_best(sweep)["tokens_per_s"], tokens / min(theirs))
        figures += [
            Figure(f"{name} at its best", tokens / statistics.median(theirs), "tokens/s"),
            Figure(f"octavo / {name}", median_ratio(theirs, ours), "times", bar, "higher"),
            # Threads of one can be in the way of another's: this holds against its luckiest run.
            Figure(
                f"octavo's median / {name}'s fastest run, also of the sweep",
                tokens / statistics.median(ours) / fastest,
                "times",
                bar,
                "higher",
            ),
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
    return Part(f"throughput, {threads} threads", figures, details)


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
