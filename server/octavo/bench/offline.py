"""A workload through `LLM`, in this process: how fast the engine is without anybody in between."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from octavo import __version__
from octavo.bench.passes import passes
from octavo.bench.summary import spread
from octavo.bench.workloads import SHAPES, Request, draw, write_shape
from octavo.errors import ConfigError, OctavoError
from octavo.llm import LLM
from octavo.params import SamplingParams
from octavo.wire import TokenOutput


def run_offline(
    model: str,
    workloads: Sequence[str],
    *,
    count: int | None = None,
    repeat: int = 2,
    seconds: float = float("inf"),
    temperature: float = 1.0,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """One row for the start, and those of `passes` for each workload: `repeat` at most, two where
    they take longer than `seconds`.

    `model` is a folder or one of `SHAPES` (random weights). `options` go to `LLM` as they are.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if model in SHAPES:
            folder = write_shape(model, Path(scratch))
            llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, **options)
        else:
            llm = LLM(model, skip_tokenizer_init=True, **options)
    started = time.perf_counter()
    llm.prepare()
    yield {
        "metric": "start",
        "s": round(started - begin, 3),
        "prepared_s": round(time.perf_counter() - started, 3),
        "version": __version__,
    }
    steps = _StepTimes(llm)
    for name in workloads:
        requests = draw(name, llm.vocab_size, count)
        taken = passes(
            partial(_generate, llm, temperature=temperature), name, requests, repeat, seconds
        )
        for row in taken:
            yield row | {"step_ms": steps.take()}


class _StepTimes:
    """What each step of an engine takes, so that a slow pass shows whether one was or all were."""

    def __init__(self, llm: LLM) -> None:
        self._seconds: list[float] = []
        loop: Any = llm._loop
        step = loop.step

        def timed() -> list[TokenOutput]:
            begin = time.perf_counter()
            found: list[TokenOutput] = step()
            self._seconds.append(time.perf_counter() - begin)
            return found

        loop.step = timed

    def take(self) -> dict[str, float]:
        """Percentiles in milliseconds since the last call."""
        found = spread(self._seconds)
        self._seconds.clear()
        return found


def _generate(llm: LLM, requests: Sequence[Request], temperature: float) -> float:
    """Seconds to draw every token that was asked for; fewer of them is an error."""
    params = [
        SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=r.output)
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r.prompt} for r in requests]
    begin = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    for request, result in zip(requests, results, strict=True):
        drawn = len(result.outputs[0].token_ids)
        if drawn != request.output:
            raise OctavoError(
                f"a request of {len(request.prompt)} prompt tokens drew {drawn} of "
                f"{request.output} tokens ({result.outputs[0].finish_reason}: "
                f"{result.outputs[0].stop_reason}); such a run measures nothing"
            )
    return seconds


def check_count(count: int | None, repeat: int, seconds: float) -> None:
    """Refuse numbers that measure nothing."""
    if count is not None and count < 1:
        raise ConfigError(f"--requests must be 1 or more, got {count}")
    if repeat < 1:
        raise ConfigError(f"--repeat must be 1 or more, got {repeat}")
    if not seconds >= 0:
        raise ConfigError(f"--seconds must be 0 or more, got {seconds:g}")
