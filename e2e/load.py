"""A closed-loop load on an LLMService, in a thread of its own: every answer is checked.

Each of N clients sends a request, waits for the whole answer, compares its text, sends the next.
Every request opens a connection of its own, so that new replicas get their share. A 429 or 503
that says when to come back is obeyed, as a normal client would, and counted as retried; any other
answer, a broken stream or a lost connection is a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import httpx

from tinymodel.tasks import Task, check

REQUEST_TIMEOUT_S = 120.0
RETRY_FOR_S = 60.0
KEPT_EXAMPLES = 10


@dataclass
class Tally:
    """What became of the requests. `sent` = right + wrong + failed once the load has ended."""

    sent: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    retried: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Keep the first few complaints."""
        if len(self.examples) < KEPT_EXAMPLES:
            self.examples.append(what)

    def as_json(self) -> dict[str, object]:
        """For a results file."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class RequestFailedError(Exception):
    """A request that did not end in a whole answer."""


def chat_body(model: str, task: Task, *, stream: bool) -> dict[str, object]:
    """One question under greedy decoding; the answer ends by itself or at the context's end."""
    return {"model": model, "messages": task.messages, "temperature": 0, "stream": stream}


def question(task: Task) -> str:
    """The user's last words, for a log."""
    return repr(task.messages[-1]["content"])


def delta_text(line: str) -> str | None:
    """The text that a line of server-sent events adds; None for [DONE]."""
    if not line.startswith("data:"):
        return ""
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise RequestFailedError(f"error in the stream: {event['error']}")
    choices = event.get("choices") or [{}]
    content = choices[0].get("delta", {}).get("content")
    return content or ""


def retry_after(answer: httpx.Response) -> float | None:
    """Seconds that a busy server asks for; None when the answer is not a request to come back."""
    if answer.status_code not in (429, 503) or "retry-after" not in answer.headers:
        return None
    return min(max(float(answer.headers["retry-after"]), 0.05), 10.0)


@dataclass
class Load:
    """A load that ends by itself: after `max_requests`, after `max_seconds`, or at `stop()`."""

    base_url: str
    model: str
    tasks: Iterable[Task]
    clients: int = 8
    max_requests: int = 100_000
    max_seconds: float = 300.0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._next: Iterator[Task] = itertools.cycle(list(self.tasks))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), name="load")
        self._deadline = 0.0

    def start(self) -> Load:
        """Begin sending."""
        self._deadline = time.monotonic() + self.max_seconds
        self._thread.start()
        return self

    def stop(self) -> Tally:
        """Send nothing new, wait for what is under way, and return the final count."""
        self._stopping.set()
        return self.wait()

    def wait(self) -> Tally:
        """The final count, once the load has ended by itself."""
        self._thread.join()
        return self.tally

    @property
    def running(self) -> bool:
        """Whether requests are still under way."""
        return self._thread.is_alive()

    async def _all(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.base_url, limits=limits, timeout=REQUEST_TIMEOUT_S, trust_env=False
        ) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self.clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        turn = number
        while (
            not self._stopping.is_set()
            and self.tally.sent < self.max_requests
            and time.monotonic() < self._deadline
        ):
            task = next(self._next)
            self.tally.sent += 1
            turn += 1
            try:
                answer = await self._ask(http, task, stream=turn % 2 == 0)
            except (RequestFailedError, httpx.HTTPError, ValueError, KeyError) as error:
                self.tally.failed += 1
                self.tally.note(f"{question(task)}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)  # a dead server must not be hammered
                continue
            if check(task, answer):
                self.tally.right += 1
            else:
                self.tally.wrong += 1
                self.tally.note(f"{question(task)}: {answer!r} instead of {task.expected!r}")

    async def _ask(self, http: httpx.AsyncClient, task: Task, *, stream: bool) -> str:
        """The whole answer, coming back for as long as the server asks for it."""
        body = chat_body(self.model, task, stream=stream)
        give_up = time.monotonic() + RETRY_FOR_S
        while True:
            async with http.stream("POST", "v1/chat/completions", json=body) as answer:
                if answer.status_code == 200:
                    return await self._read(answer, stream=stream)
                said = (await answer.aread())[:300]
            pause = retry_after(answer)
            if pause is None or time.monotonic() + pause > give_up:
                raise RequestFailedError(f"{answer.status_code} {said!r}")
            self.tally.retried += 1
            await asyncio.sleep(pause)

    async def _read(self, answer: httpx.Response, *, stream: bool) -> str:
        if not stream:
            await answer.aread()
            content: str = answer.json()["choices"][0]["message"]["content"]
            return content
        parts: list[str] = []
        async for line in answer.aiter_lines():
            part = delta_text(line)
            if part is None:
                return "".join(parts)
            parts.append(part)
        raise RequestFailedError("the stream ended without [DONE]")


def stream_answer(base_url: str, model: str, task: Task) -> Iterator[str]:
    """One streamed answer, part by part as it arrives."""
    body = chat_body(model, task, stream=True)
    url = f"{base_url}/v1/chat/completions"
    with httpx.Client(timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
        with http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                raise RequestFailedError(f"{answer.status_code} {answer.read()[:300]!r}")
            for line in answer.iter_lines():
                part = delta_text(line)
                if part is None:
                    return
                if part:
                    yield part
    raise RequestFailedError("the stream ended without [DONE]")
