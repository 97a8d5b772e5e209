"""Passes over a workload, by one rule for every engine that is measured: a warm-up, which is not
counted, then as many passes as a short workload needs and a long one has time for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

from octavo.bench.summary import throughput
from octavo.bench.workloads import Request

# Seconds to draw all that the requests ask for.
Generate = Callable[[list[Request]], float]

# So many are taken whatever they take: one alone has no spread.
LEAST = 2
# What a request draws in the warm-up at most: every size of batch comes, in a fraction of a pass.
WARM_UP_TOKENS = 32


def passes(
    generate: Generate, name: str, requests: list[Request], most: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """The warm-up's row, then one for each pass: at most `most`, and when `seconds` are over no
    more than `LEAST`.

    What lives now is kept from the garbage collector: walking all of it would take as long as some
    passes do, and it is what servers do before they serve.
    """
    gc.collect()
    gc.freeze()
    short = [r._replace(output=min(r.output, WARM_UP_TOKENS)) for r in requests]
    yield {"metric": "warm_up", "load": name, "s": round(generate(short), 4)}
    spent = 0.0
    for repetition in range(most):
        if repetition >= LEAST and spent >= seconds:
            return
        taken = generate(requests)
        spent += taken
        yield throughput(name, repetition, requests, taken)
