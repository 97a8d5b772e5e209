"""Streams at their edges: slow readers, failures, odd characters, clients that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer, eventually, running

from octavo.api import http_io
from octavo.api.errors import ApiError
from octavo.api.generation import Delta, Usage
from octavo.api.http_io import StreamResponse
from octavo.api.requests import StreamOptions
from octavo.api.sse import ChatForm, CompletionForm

SCOPE = {"type": "http", "method": "POST", "headers": []}


@dataclass
class FakeGeneration:
    """Yields the given deltas; an exception among them is raised in its turn."""

    script: Iterable[Delta | Exception]
    closed: int = 0
    choices: list[Any] = field(default_factory=list)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            yield [step]

    def usage(self) -> Usage:
        return Usage(1, 2, 0)

    def close(self) -> None:
        self.closed += 1


class Client:
    """The ASGI side of a client: records, and blocks from message `stops_at` on."""

    def __init__(self, stops_at: int = 10**9) -> None:
        self.messages: list[dict[str, Any]] = []
        self._stops_at = stops_at

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.messages) >= self._stops_at:
            await asyncio.Event().wait()
        self.messages.append(message)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)


def play(generation: FakeGeneration, client: Client) -> Client:
    form = CompletionForm("cmpl-1", "tiny")
    response = StreamResponse(generation, form, StreamOptions())  # type: ignore[arg-type]
    asyncio.run(response(SCOPE, client.receive, client.send))
    assert generation.closed == 1
    return client


def test_a_failure_before_the_first_text_is_an_http_error() -> None:
    client = play(FakeGeneration([ApiError(500, "gone", retry_after=1)]), Client())
    assert client.status == 500
    assert json.loads(client.body)["error"]["message"] == "gone"


@pytest.mark.parametrize(
    ("error", "message"),
    [(ApiError(500, "gone"), "gone"), (KeyError("bug"), "internal error")],
)
def test_a_later_failure_is_the_one_final_event(error: Exception, message: str) -> None:
    client = play(FakeGeneration([Delta(0, "a"), error]), Client())
    assert client.status == 200
    assert client.body.count(b'data: {"error"') == 1
    assert message.encode() in client.body
    assert b"bug" not in client.body
    assert client.body.endswith(b"data: [DONE]\n\n")
    assert client.messages[-1]["more_body"] is False


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_io, "SEND_STALL_S", 0.05)
    client = play(FakeGeneration([Delta(0, "a"), Delta(0, "b")]), Client(stops_at=2))
    assert b'"text":"a"' in client.body


@pytest.mark.parametrize("form", [ChatForm, CompletionForm])
@pytest.mark.parametrize("text", ["\u2028\u2029\u0085", '"\\\n\r\t\x00', "🦑é", "</script>"])
def test_a_chunk_is_one_line_and_the_same_text(form: Any, text: str) -> None:
    events = form("id-1", 'a "name"').chunk(Delta(0, text, "stop", text), None).decode()
    assert all(line.startswith("data: {") or not line for line in events.splitlines())
    last = json.loads(events.split("\n\n")[-2][6:])
    choice = last["choices"][0]
    assert (choice["text"] if "text" in choice else choice["delta"]["content"]) == text
    assert choice["stop_reason"] == text
    assert last["model"] == 'a "name"'


# Clients that come and go


def open_files(server: ApiServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def resident_mib(server: ApiServer) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def leave_somewhere(server: ApiServer, chance: random.Random) -> None:
    """Connect, send part or all of a request, perhaps read a little, and close without a word."""
    body = b'{"prompt": ["one two", "three"], "stream": %s}' % chance.choice([b"true", b"false"])
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(request[: chance.randrange(1, 2 * len(request))])
        if chance.random() < 0.5:
            client.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                client.recv(200)


def test_connects_and_disconnects_leave_nothing_behind(tmp_path: Path) -> None:
    chance = random.Random(7)
    with running(tmp_path, engine=["--step-ms", "5"]) as server:

        def churn(times: int) -> None:
            for _ in range(times):
                leave_somewhere(server, chance)
            eventually(lambda: server.load()["running"] == 0, what="idle engine")
            eventually(lambda: server.load()["waiting"] == 0, what="empty queue")

        churn(50)
        files, memory = open_files(server), resident_mib(server)
        churn(300)
        eventually(lambda: open_files(server) <= files + 2, what="closed files")
        assert resident_mib(server) - memory < 16
        journal = server.journal()
        added = [line["id"] for line in journal if line["kind"] == "AddRequest"]
        aborted = [line["id"] for line in journal if line["kind"] == "AbortRequest"]
        assert len(added) > 50
        assert sorted(added) == sorted(aborted)
        assert len(set(added)) == len(added)
        # All places were given back: the server would otherwise not drain at once.
        server.terminate()
        assert server.exit_code(5) == 0
        assert "Traceback" not in server.log(), server.log()
