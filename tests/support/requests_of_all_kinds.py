"""Requests of every kind that a runner may be given, and an engine loop that serves them."""

import numpy as np

from octavo import wire
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.swap import SwapSpace
from octavo.engine.loop import EngineLoop
from octavo.params import SamplingParams

BLOCK, MAX_SEQS, BUDGET, VOCAB = 4, 6, 24, 96


def requests(seed: int, count: int) -> list[wire.AddRequest]:
    random = np.random.default_rng(seed)
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.7, "top_k": 5, "seed": 4},
        {"top_p": 0.8, "min_p": 0.05},
        {"n": 2, "seed": 9},
        {"min_tokens": 4, "stop_token_ids": tuple(range(40))},
        {"logit_bias": {7: 5.0}, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 3, "seed": 2},
        {"frequency_penalty": 0.7, "bad_words_ids": ((4,), (5, 6)), "temperature": 0.0},
        {"frequency_penalty": 0.9, "bad_words_ids": ((8,), (9,)), "logit_bias": {8: 9.0, 3: 4.0}},
        {"typical_p": 0.7, "repetition_penalty": 1.2, "seed": 5},
        {"typical_p": 0.6, "seed": 1},
        {"allowed_token_ids": (3, 4, 5)},
        {"use_beam_search": True, "temperature": 0.0, "best_of": 2, "n": 2},
        {"stop_token_ids": tuple(range(0, 96, 3))},
        {"prompt_logprobs": 0, "temperature": 0.0},
    ]
    made = []
    for i in range(count):
        kind = kinds[(i + seed) % len(kinds)]
        prompt = random.integers(3, VOCAB, random.integers(1, 30)).tolist()
        most = int(random.integers(1, 16))
        if "min_tokens" in kind:
            most = max(most, kind["min_tokens"])
        params = SamplingParams(**{"max_tokens": most, "ignore_eos": bool(i % 2), **kind})
        made.append(wire.AddRequest(f"r{i}", prompt, params))
    return made


def run(runner, asked: list[wire.AddRequest], num_blocks: int, depth: int, host_blocks: int = 0):
    """What each request got: (tokens, log-probabilities, end) by request and sample.

    With `host_blocks` whoever is preempted is swapped out.
    """
    limits = Limits(
        block_size=runner.block_size, max_model_len=runner.max_model_len, max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BUDGET, vocab_size=VOCAB, eos_token_ids=frozenset({2}),
        kv_windows=runner.kv_windows,
    )  # fmt: skip
    swap = SwapSpace(host_blocks, runner.allocate_swap(host_blocks + 1)) if host_blocks else None
    scheduler = Scheduler(BlockPool(num_blocks), PolicyFactory.get_policy("fcfs"), limits, swap)
    loop = EngineLoop(scheduler, runner, depth=depth)
    if swap is not None:
        swap.recompute_seconds = lambda tokens: 1e9
    waiting = list(asked)
    got: dict[tuple[str, int], tuple[list, list, list]] = {}
    steps = 0
    while loop.has_work or waiting:
        if waiting and steps % 3 == 0:
            loop.add(waiting.pop(0))
        for output in loop.step():
            own = got.setdefault((output.request_id, output.index), ([], [], []))
            own[0].extend(output.token_ids)
            for found in (output.logprobs, output.prompt_logprobs):
                own[1].extend(found or [])
            own[2].extend([output.finish_reason] if output.finish_reason else [])
        steps += 1
        assert steps < 3000
    scheduler.check_integrity()
    assert swap is None or swap.blocks_in > 0
    return got, scheduler.counters.preemptions
