"""An open-loop load on any OpenAI-compatible endpoint: requests leave when due, never later.

A closed loop, which waits for an answer before it asks again, slows down with the server and hides
what its users would feel ("coordinated omission", as G. Tene named it). The clock of a request
starts when it was due.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from octavo.bench.summary import Timeline, summarize
from octavo.bench.workloads import Request

_DONE = b"data: [DONE]"
# Only the last event, which has no output, counts tokens; inside a text the marks are escaped.
_USAGE = b'"completion_tokens"'


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send, and how long to wait for one answer at most (seconds)."""

    url: str
    model: str
    timeout_s: float = 600.0


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When each request is due: a Poisson process of `rate` a second; all at once if infinite."""
    if rate == float("inf"):
        return [0.0] * count
    rng, now, due = random.Random(seed), 0.0, []  # noqa: S311 (no secrets)
    for _ in range(count):
        now += rng.expovariate(rate)
        due.append(now)
    return due


def run_load(
    target: Target, requests: Sequence[Request], rate: float, seed: int = 0
) -> dict[str, Any]:
    """Send all requests at their times; returns `summary.summarize`'s figures.

    `client_cpu` is the share of one core that this process took: near 1, the client was what
    was measured.
    """
    begin = time.process_time()
    row = asyncio.run(_run(target, requests, arrivals(len(requests), rate, seed)))
    row["client_cpu"] = round((time.process_time() - begin) / max(row["s"], 1e-3), 3)
    return row


async def _run(target: Target, requests: Sequence[Request], due: list[float]) -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()
        tasks = [
            asyncio.create_task(_request(session, target, request, begin, at))
            for request, at in zip(requests, due, strict=True)
        ]
        timelines = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - begin
    return summarize(timelines, seconds)


async def _request(
    session: aiohttp.ClientSession, target: Target, request: Request, begin: float, due: float
) -> Timeline:
    timeline = Timeline(due, request.output)
    body = {
        "model": target.model,
        "prompt": request.prompt,
        "max_tokens": request.output,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    await asyncio.sleep(begin + due - time.perf_counter())
    try:
        async with session.post(f"{target.url}/v1/completions", json=body) as response:
            if response.status != 200:
                timeline.error = f"{response.status}: {(await response.text())[:200]}"
                return timeline
            await _read(response, timeline, begin)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        timeline.error = f"{type(error).__name__}: {error}"
    return timeline


async def _read(response: aiohttp.ClientResponse, timeline: Timeline, begin: float) -> None:
    """Note when output came; one read may hold several events, which came together."""
    tail = b""
    async for data in response.content.iter_any():
        now = time.perf_counter() - begin
        events = (tail + data).split(b"\n\n")
        tail = events.pop()
        for event in events:
            if b'"error"' in event:
                timeline.error = event[:200].decode(errors="replace")
            elif _USAGE in event:
                _check_usage(event, timeline)
            elif event.startswith(b"data:") and not event.startswith(_DONE):
                timeline.events.append(now)
            elif event.startswith(_DONE):
                return
    if timeline.error is None:
        timeline.error = "the stream ended without [DONE]"


def _check_usage(event: bytes, timeline: Timeline) -> None:
    """A server that ended a text early would look fast."""
    drawn = json.loads(event.removeprefix(b"data:"))["usage"]["completion_tokens"]
    if drawn != timeline.output:
        timeline.error = f"{drawn} tokens came of {timeline.output} that were asked for"
