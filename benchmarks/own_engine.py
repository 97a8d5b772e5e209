"""Our engine for a benchmark that looks inside it: started from a folder or a model's shape."""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from octavo import LLM
from octavo.bench.workloads import SHAPES, Request, write_shape
from octavo.engine.loop import EngineLoop

F = TypeVar("F", bound=Callable[..., Any])

# As in a sitting (`gpu.py`): what every engine there is given.
MAX_MODEL_LEN = 4096


def start(model: str, **options: Any) -> LLM:
    """An engine without a tokenizer; the weights of one of `SHAPES` are random.

    What is there when it has started is no garbage and is not looked through for any, as in the
    server's engine process.
    """
    options = {
        "skip_tokenizer_init": True, "enable_prefix_caching": False, "max_model_len": MAX_MODEL_LEN,
    } | options  # fmt: skip
    if model in SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(write_shape(model, Path(scratch)))
            llm = LLM(folder, load_format="dummy", dtype="bfloat16", **options)
    else:
        llm = LLM(model, **options)
    gc.collect()
    gc.freeze()
    return llm


class HostTimes:
    """Seconds that the parts of a step take of the host: plan, submit, collect, commit.

    `collect` is waiting for the device; the others are work, hidden where a step is in flight.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self.seconds: Counter[str] = Counter()
        parts = (
            (loop.scheduler, ("plan", "commit")),
            (loop._runner, ("submit", "collect")),
        )
        for owner, names in parts:
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name), name))

    def _timed(self, function: F, name: str) -> F:
        def timed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed  # type: ignore[return-value]

    def take(self, steps: int) -> dict[str, float]:
        """Milliseconds a step since the last call."""
        found = {name: round(1e3 * total / steps, 4) for name, total in self.seconds.items()}
        self.seconds.clear()
        return found


def fits(request: Request, max_model_len: int) -> Request:
    """The request, cut to what a small model's context allows."""
    if len(request.prompt) + request.output <= max_model_len:
        return request
    output = min(request.output, max_model_len // 2)
    return Request(request.prompt[: max_model_len - output], output)
