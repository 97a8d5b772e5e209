"""Reading bodies and writing answers so that a bad client costs nobody else anything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.api.direct import DirectWriter, direct_writer, hang_up
from octavo.api.errors import ApiError
from octavo.api.generation import Delta, Generation
from octavo.api.limits import BODY_TIMEOUT_S, LARGE_BODY_BYTES, MAX_BODY_BYTES, SEND_STALL_S
from octavo.api.requests import StreamOptions
from octavo.api.sse import DONE, Answer, Form, error_event

log = logging.getLogger(__name__)
T = TypeVar("T")
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells proxies to pass events on at once
]


async def read_body(request: Request, decode: Callable[[bytes], T]) -> T:
    """Read and decode a JSON body within its bounds of size and time."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(400, f"Content-Type must be application/json, got {kind[:100]!r}")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await _bounded(request)
    except ClientDisconnect:
        raise ApiError(400, "the client left in the middle of the body") from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    if len(raw) > LARGE_BODY_BYTES:
        return await asyncio.to_thread(decode, raw)
    return decode(raw)


async def _bounded(request: Request) -> bytes:
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise too_large
    return bytes(raw)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work`; cancel it and return None when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole_response(request: Request, generation: Generation, form: Form) -> Response:
    """Generate to the end and answer once."""
    try:
        body = await unless_disconnected(request.receive, _collect(generation, form))
    finally:
        generation.close()
    # A client that left gets no answer; 499 is what proxies log for it.
    return Response(body or b"", 200 if body else 499, media_type="application/json")


async def _collect(generation: Generation, form: Form) -> bytes:
    answers = [Answer() for _ in generation.choices]
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                answers[delta.index].add(delta)
    for answer, choice in zip(answers, generation.choices, strict=True):
        answer.prompt_logprobs = choice.prompt_logprobs
    return form.whole([answers[i] for i in generation.best()], generation.usage())


class StreamResponse(Response):
    """Server-sent events for a generation, ended by a final event whatever happens.

    The status line waits for the first text, so that an early failure still is an HTTP error that
    clients retry by themselves.
    """

    def __init__(self, generation: Generation, form: Form, options: StreamOptions) -> None:
        super().__init__()
        self._generation = generation
        self._form = form
        self._options = options
        self._running_usage = options.include_usage and options.continuous_usage_stats
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end or until the client leaves."""
        try:
            await unless_disconnected(receive, self._run(scope, receive, send))
        except TimeoutError:
            log.warning("gave up a client that did not read for %g s", SEND_STALL_S)
            hang_up(scope)
        finally:
            self._generation.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._stream(send, direct_writer(scope))
        except ApiError as error:
            failure = error
        except TimeoutError:
            raise
        except Exception:
            log.exception("a stream failed")
            failure = ApiError(500, "internal error; the request may be sent again")
        else:
            return
        if self._started:
            await self._send(send, error_event(failure.body()) + DONE, more=False)
        else:
            async with asyncio.timeout(SEND_STALL_S):
                await failure.response()(scope, receive, send)

    async def _stream(self, send: Send, direct: DirectWriter | None) -> None:
        async with aclosing(self._generation.deltas()) as batches:
            async for batch in batches:
                await self._start(send)
                await self._send(send, self._events(batch), more=True)
                if direct is not None:
                    # Until the end, or until the socket is full: then this loop waits for it.
                    await self._generation.forward(partial(self._write, direct))
        tail = DONE
        if self._options.include_usage:
            tail = self._form.usage_chunk(self._generation.usage()) + DONE
        await self._send(send, tail, more=False)

    def _write(self, direct: DirectWriter, batch: list[Delta]) -> bool:
        return direct.write(self._events(batch))

    def _events(self, batch: list[Delta]) -> bytes:
        if not self._running_usage:
            return b"".join([self._form.chunk(delta, None) for delta in batch])
        choices = self._generation.choices
        return b"".join([self._form.chunk(d, choices[d.index].usage) for d in batch])

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            # An earlier answer on the same connection may still wait to be read.
            async with asyncio.timeout(SEND_STALL_S):
                await send(
                    {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
                )

    @staticmethod
    async def _send(send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(SEND_STALL_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
