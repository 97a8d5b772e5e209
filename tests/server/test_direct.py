"""Events written straight to sockets, read back by h11; ASGI's own way is the oracle."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
import uvicorn
import zmq
from api_server import MODEL
from fastapi import FastAPI
from starlette.responses import Response

from octavo import wire
from octavo.api import http_io
from octavo.api.direct import DirectProtocol, DirectWriter
from octavo.api.engine_client import MAX_MESSAGES_AT_ONCE, Arrival, EngineClient, Mailbox
from octavo.api.generation import Choice, Delta, Generation, Prompt
from octavo.api.http_io import StreamResponse
from octavo.api.launch import listen
from octavo.api.request_id import RequestIdMiddleware
from octavo.api.requests import StreamOptions
from octavo.api.sse import ChatForm, CompletionForm
from octavo.errors import ConfigError
from octavo.logprobs import TokenLogprobs
from octavo.metrics import Metrics
from octavo.params import SamplingParams
from octavo.text.tokenizer import Tokenizer
from octavo.wire import TokenOutput

TOKENIZER = Tokenizer.load(MODEL)
TOKENS = [20 + i % 300 for i in range(400)]
SOCKET_BYTES = 8192


@dataclass
class Engine:
    """Notes what is asked of it."""

    aborted: list[tuple[str, int]] = field(default_factory=list)

    def submit(self, *_: Any) -> None: ...

    def abort(self, request_id: str, sample: int) -> None:
        self.aborted.append((request_id, sample))


def generation(samples: int = 1, **params: Any) -> Generation:
    prompt = Prompt([20, 21], SamplingParams(n=samples, **params))
    choices = [Choice(i, prompt, TOKENIZER) for i in range(samples)]
    metrics = Metrics("tiny", {}, lambda: None)  # type: ignore[arg-type, return-value]
    engine: Any = Engine()
    return Generation("cmpl-1", choices, engine, metrics, lambda _: None, samples)


def arrive(mailbox: Mailbox, tokens: list[int], reason: str | None = None, index: int = 0) -> None:
    mailbox.put(Arrival(index, TokenOutput("cmpl-1-0", tokens, reason), time.monotonic()))
    mailbox.notify()


@dataclass
class Served:
    """One streaming response behind a real socket."""

    generation: Generation
    form: Any = CompletionForm
    options: StreamOptions = field(default_factory=StreamOptions)
    bodies: int = 0  # messages with a body that went through ASGI
    writer: DirectWriter | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            self.bodies += message["type"] == "http.response.body"
            await send(message)

        self.writer = http_io.direct_writer(scope)
        response = StreamResponse(self.generation, self.form("cmpl-1", "tiny"), self.options)
        try:
            await response(scope, receive, counted)
        finally:
            self.ended.set()


@asynccontextmanager
async def connected(
    served: Served, version: str = "1.1", app: Any = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has sent its request; small buffers, so that a lazy reader is soon noticed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    config = uvicorn.Config(
        app or served.app, interface="asgi3", http=DirectProtocol, ws="none", lifespan="off",
        log_config=None,
        access_log=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server._serve(sockets=[listener]))
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
    reader, writer = await asyncio.open_connection(sock=client, limit=SOCKET_BYTES)
    writer.write(f"POST / HTTP/{version}\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await task
        listener.close()


async def body(reader: asyncio.StreamReader) -> bytes:
    """The whole body; h11 refuses any wrong framing."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    found = b""
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Data):
            found += event.data
        elif isinstance(event, h11.EndOfMessage):
            return found


async def old_body(reader: asyncio.StreamReader) -> bytes:
    """The body for a client of HTTP/1.0: whatever comes until the connection is closed."""
    return (await reader.read(-1)).partition(b"\r\n\r\n")[2]


def events(raw: bytes) -> list[dict[str, Any]]:
    lines = raw.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def text_of(found: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for event in found for c in event["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


async def fed(source: Generation, tokens: list[int], reason: str | None = "length") -> None:
    """A token a turn of the loop, as an engine's steps bring them."""
    for token in tokens[:-1]:
        arrive(source.mailbox, [token])
        await asyncio.sleep(0)
    arrive(source.mailbox, tokens[-1:], reason)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@pytest.mark.parametrize("form", [CompletionForm, ChatForm])
def test_a_step_is_one_event_and_no_message_of_asgi(form: Any) -> None:
    async def work() -> None:
        served = Served(generation(), form)
        async with connected(served) as (reader, _):
            feeding = asyncio.ensure_future(fed(served.generation, TOKENS))
            found = events(await body(reader))
            await feeding
        assert text_of(found) == TOKENIZER.decode(TOKENS)
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        # The first text begins the response and [DONE] ends it; all between is written directly.
        assert served.bodies == 2

    run(work())


def test_the_way_leads_through_our_application() -> None:
    async def work() -> None:
        served = Served(generation())
        app = FastAPI()
        app.mount("/", served.app)
        app.add_middleware(RequestIdMiddleware)
        async with connected(served, app=app) as (reader, _):
            feeding = asyncio.ensure_future(fed(served.generation, TOKENS))
            assert text_of(events(await body(reader))) == TOKENIZER.decode(TOKENS)
            await feeding
        assert served.bodies == 2

    run(work())


def test_the_same_events_as_through_asgi_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> list[dict[str, Any]]:
        options = StreamOptions(include_usage=True, continuous_usage_stats=True)
        served = Served(generation(samples=2), options=options)
        mailbox = served.generation.mailbox
        async with connected(served) as (reader, _):
            reading = asyncio.ensure_future(body(reader))
            for place, token in enumerate(TOKENS):
                for index in (0, 1):
                    last = place == len(TOKENS) - 1
                    arrive(mailbox, [token + index], "length" if last else None, index)
                await asyncio.sleep(0.001)  # for both ways each token comes alone
            found = events(await reading)
            assert (served.bodies == 2) == (served.writer is not None)
        return [{k: v for k, v in event.items() if k != "created"} for event in found]

    ways: dict[str, list[dict[str, Any]]] = {}

    async def work(name: str) -> None:
        ways[name] = await answer()

    run(work("direct"))
    monkeypatch.setattr(http_io, "direct_writer", lambda scope: None)
    run(work("asgi"))
    for index in (0, 1):
        assert text_of(ways["direct"], index) == text_of(ways["asgi"], index) != ""
    assert ways["direct"][-1] == ways["asgi"][-1]  # the usage


def test_a_slow_reader_gets_all_of_it_in_fewer_events() -> None:
    async def work() -> None:
        tokens = TOKENS * 30
        served = Served(generation())
        async with connected(served) as (reader, _):
            await fed(served.generation, tokens)
            assert served.writer is not None
            waiting = served.writer._transport.get_write_buffer_size()
            assert 0 < waiting <= 128 * 1024, "the rest waits as tokens, not as bytes"
            found = events(await body(reader))
        assert text_of(found) == TOKENIZER.decode(tokens)
        assert len(found) < len(tokens) / 2
        assert served.bodies > 2, "a full socket is waited for through ASGI"

    run(work())


def test_a_reader_that_catches_up_is_written_to_directly_again() -> None:
    async def work() -> None:
        served = Served(generation())
        async with connected(served) as (reader, _):
            reading = None
            await fed(served.generation, TOKENS * 30, None)
            reading = asyncio.ensure_future(body(reader))
            await asyncio.sleep(0.3)
            slow = served.bodies
            await fed(served.generation, TOKENS)
            found = events(await reading)
        assert text_of(found) == TOKENIZER.decode(TOKENS * 31)
        assert served.bodies <= slow + 2

    run(work())


def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_io, "SEND_STALL_S", 0.2)

    async def work() -> None:
        served = Served(generation())
        async with connected(served):
            for _ in range(100):
                await fed(served.generation, TOKENS, None)
                if served.ended.is_set():
                    break
                await asyncio.sleep(0.01)
            assert served.writer is not None
            await asyncio.sleep(0)
            assert served.writer._transport.get_write_buffer_size() == 0, "its socket is held"
        assert served.generation.engine.aborted == [("cmpl-1-0", 0)]  # type: ignore[attr-defined]

    run(work())


def test_a_stream_behind_an_unread_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_io, "SEND_STALL_S", 0.2)

    async def work() -> None:
        served = Served(generation())
        answers = [Response(b"x" * 1_000_000), served.app]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await answers.pop(0)(scope, receive, send)

        async with connected(served, app=app) as (_, writer):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            arrive(served.generation.mailbox, [30])
            await asyncio.wait_for(served.ended.wait(), 5)
        assert served.generation.engine.aborted == [("cmpl-1-0", 0)]  # type: ignore[attr-defined]

    run(work())


def test_a_client_that_leaves_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        served = Served(generation())
        async with connected(served) as (reader, writer):
            await fed(served.generation, TOKENS[:50], None)
            await reader.read(10)
            writer.transport.abort()
            while not served.ended.is_set():
                await fed(served.generation, TOKENS[:5], None)
                await asyncio.sleep(0.001)
        assert served.generation.engine.aborted == [("cmpl-1-0", 0)]  # type: ignore[attr-defined]
        await fed(served.generation, TOKENS[:5], None)  # nobody reads this any more

    with caplog.at_level(logging.WARNING):
        run(work())
    assert not caplog.records


def test_a_client_that_ends_its_side_reads_on_without_a_gap() -> None:
    async def work() -> None:
        served = Served(generation())
        source = served.generation
        async with connected(served) as (reader, writer):
            sent = 0
            while served.writer is None or served.writer._transport.get_write_buffer_size() < 8192:
                await fed(source, TOKENS[:20], None)
                sent += 1
            writer.write_eof()
            while not served.writer._transport.is_closing():
                await asyncio.sleep(0.001)
            await fed(source, TOKENS)
            found = events(await body(reader))
        assert text_of(found) == TOKENIZER.decode(TOKENS[:20] * sent + TOKENS)

    run(work())


def test_a_failure_that_is_no_exception_stays_with_its_stream() -> None:
    class Panic(BaseException):
        """As the tokenizer's back end raises, when it has a bug."""

    def breaks(_: list[Delta]) -> bool:
        raise Panic

    async def work() -> None:
        source = generation()
        arrive(source.mailbox, [30])
        task = asyncio.ensure_future(source.forward(lambda _: True))
        broken = asyncio.ensure_future((other := generation()).forward(breaks))
        await asyncio.sleep(0)
        arrive(other.mailbox, [30])  # in the turn that serves all streams
        arrive(source.mailbox, [31], "length")
        await task
        with pytest.raises(Panic):
            await broken

    run(work())


def test_old_http_has_no_chunks() -> None:
    async def work() -> None:
        served = Served(generation())
        async with connected(served, version="1.0") as (reader, _):
            feeding = asyncio.ensure_future(fed(served.generation, TOKENS))
            found = events(await old_body(reader))
            await feeding
        assert text_of(found) == TOKENIZER.decode(TOKENS)
        assert served.writer is None

    run(work())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (TokenOutput("cmpl-1-0", [], "error", error="gone"), "gone"),
        (TokenOutput("cmpl-1-0", ["x"]), "internal error"),  # type: ignore[list-item]
    ],
)
def test_a_failure_in_the_middle_is_the_one_final_event(broken: TokenOutput, message: str) -> None:
    async def work() -> None:
        served = Served(generation())
        mailbox = served.generation.mailbox
        async with connected(served) as (reader, _):
            await fed(served.generation, TOKENS[:50], None)
            await asyncio.sleep(0.05)
            for output in (TokenOutput("cmpl-1-0", [30]), broken, TokenOutput("cmpl-1-0", [31])):
                mailbox.put(Arrival(0, output, time.monotonic()))
                mailbox.notify()
            *_, last, done, end = (await body(reader)).decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert message in json.loads(last.removeprefix("data: "))["error"]["message"]

    run(work())


# The way from the engine's socket


def test_messages_that_pile_up_are_delivered_whole_and_notified_once(tmp_path: Path) -> None:
    count = 3 * MAX_MESSAGES_AT_ONCE + 7
    requests = [
        wire.AddRequest(name, [1], SamplingParams(n=2, max_tokens=count)) for name in ("a", "b")
    ]

    async def work() -> None:
        client = EngineClient(tmp_path)
        context = zmq.Context()
        sender = context.socket(zmq.PUSH)
        sender.setsockopt(zmq.SNDHWM, 0)
        sender.connect(f"ipc://{tmp_path}/events.sock")
        notified: list[int] = []
        arrivals: list[Arrival] = []
        mailbox = Mailbox()

        def read() -> None:
            found = mailbox.empty()
            notified.append(len(found))
            arrivals.extend(found)

        for first, request in enumerate(requests):
            client.submit(request, mailbox, 2 * first)
        for step in range(count):
            reason = "length" if step == count - 1 else None
            outputs = [
                TokenOutput(name, [step], reason, index=i) for name in ("a", "b") for i in (0, 1)
            ]
            sender.send(wire.encoder.encode(wire.Outputs(outputs)))
        sender.send(wire.encoder.encode(wire.Progress("weights", 1.0)))
        with mailbox.read_by(read):
            seen = 0
            async for message in client.messages():
                seen += isinstance(message, wire.Outputs)
                if isinstance(message, wire.Progress):
                    break
        assert seen == count
        assert client.in_flight == 0
        for index in range(4):
            mine = [a.output.token_ids[0] for a in arrivals if a.index == index]
            assert mine == list(range(count))
        assert len(notified) < count, "what came together is read together"
        sender.close()
        context.term()
        client.close()

    run(work())


def test_a_mailbox_keeps_what_comes_while_nobody_reads() -> None:
    async def work() -> None:
        source = generation()
        arrive(source.mailbox, [30])
        arrive(source.mailbox, [31])
        taken: list[Delta] = []

        def take(deltas: list[Delta]) -> bool:
            taken.extend(deltas)
            return False

        await source.forward(take)
        assert [d.text for d in taken] == [TOKENIZER.decode([30]) + TOKENIZER.decode([31])]
        arrive(source.mailbox, [32])
        arrive(source.mailbox, [33], "length")
        rest = [d async for batch in source.deltas() for d in batch]
        assert [d.finish_reason for d in rest] == ["length"]

    run(work())


def test_what_waited_for_a_slow_reader_is_put_together_in_linear_time() -> None:
    """Or the one turn of the loop that does it stops every other stream."""
    found = TokenLogprobs(30, -1.0, 1, [], [])

    async def work() -> None:
        source = generation(samples=2, logprobs=0)
        for place in range(40_000):
            output = TokenOutput("cmpl-1-0", [30], logprobs=[found], index=place % 2)
            source.mailbox.put(Arrival(place % 2, output, time.monotonic()))
        taken: list[Delta] = []
        begin = time.process_time()
        await source.forward(lambda deltas: taken.extend(deltas) or False)  # type: ignore[func-returns-value]
        assert time.process_time() - begin < 1
        assert [d.index for d in taken] == [0, 1]
        for delta in taken:
            assert delta.text == TOKENIZER.decode([30]) * 20_000
            assert [p.offset for p in delta.logprobs] == list(range(20_000))

    run(work())


# The socket itself


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_small_writes_do_not_wait_for_acknowledgements(host: str) -> None:
    try:
        listener = listen(host, 0)
    except ConfigError as error:  # a machine without IPv6
        pytest.skip(str(error))
    with listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
