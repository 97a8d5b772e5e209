"""The load driver counts right, wrong, retried and failed against a server that misbehaves."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))

from load import Load, RequestFailedError, stream_answer
from tinymodel import tasks

TASK = tasks.count_task(1, 5)
Reply = Callable[["Handler", dict[str, object], int], None]


class Handler(BaseHTTPRequestHandler):
    reply: Reply
    seen: list[dict[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        self.reply(body, len(self.seen))

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body: dict[str, object], text: str, *, done: bool = True) -> None:
        if not body["stream"]:
            message = {"choices": [{"message": {"content": text}}]}
            self.send(200, json.dumps(message).encode())
            return
        parts = [{"choices": [{"delta": {"content": char}}]} for char in text]
        lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
        self.send(200, "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(reply: Reply) -> Iterator[tuple[str, list[dict[str, object]]]]:
    seen: list[dict[str, object]] = []
    handler = type("Handler", (Handler,), {"reply": reply, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def drive(base_url: str, requests: int, **changes: object) -> Load:
    load = Load(base_url, "tiny", [TASK], clients=1, max_requests=requests, max_seconds=20)
    for name, value in changes.items():
        setattr(load, name, value)
    load.start().wait()
    return load


def test_right_answers_streamed_and_not() -> None:
    with serving(lambda h, body, n: h.answer(body, TASK.expected)) as (url, seen):
        tally = drive(url, 4).tally
    assert (tally.sent, tally.right, tally.failed, tally.wrong) == (4, 4, 0, 0)
    assert {body["stream"] for body in seen} == {True, False}
    assert all(body["temperature"] == 0 for body in seen)


def test_a_wrong_text_is_counted_and_quoted() -> None:
    with serving(lambda h, body, n: h.answer(body, "1, 2, 4, 5")) as (url, _):
        tally = drive(url, 2).tally
    assert (tally.right, tally.wrong) == (0, 2)
    assert "1, 2, 4, 5" in tally.examples[0]


def test_busy_server_is_asked_again_and_counted_as_retried() -> None:
    def reply(h: Handler, body: dict[str, object], n: int) -> None:
        if n == 1:
            h.send(503, b"draining", retry_after="0.01")
        elif n == 2:
            h.send(429, b"full", retry_after="0.01")
        else:
            h.answer(body, TASK.expected)

    with serving(reply) as (url, _):
        tally = drive(url, 1).tally
    assert (tally.sent, tally.right, tally.retried, tally.failed) == (1, 1, 2, 0)


@pytest.mark.parametrize("status", [500, 503, 400])
def test_an_error_that_asks_for_nothing_is_a_failure(status: int) -> None:
    with serving(lambda h, body, n: h.send(status, b"broken")) as (url, _):
        tally = drive(url, 1).tally
    assert (tally.failed, tally.retried) == (1, 0)
    assert str(status) in tally.examples[0]


def test_a_stream_without_its_end_is_a_failure() -> None:
    with serving(lambda h, body, n: h.answer(body, TASK.expected, done=False)) as (url, _):
        tally = drive(url, 2).tally
        with pytest.raises(RequestFailedError, match="DONE"):
            list(stream_answer(url, "tiny", TASK))
    assert tally.right + tally.failed == 2
    assert tally.failed == 1  # the streamed one


def test_an_error_inside_a_stream_is_a_failure() -> None:
    def reply(h: Handler, body: dict[str, object], n: int) -> None:
        h.send(200, b'data: {"error": {"message": "engine died"}}\n\n')

    with serving(reply) as (url, _), pytest.raises(RequestFailedError, match="engine died"):
        list(stream_answer(url, "tiny", TASK))


def test_a_lost_connection_is_a_failure() -> None:
    def reply(h: Handler, body: dict[str, object], n: int) -> None:
        h.send_response(200)
        h.send_header("content-length", "1000")
        h.end_headers()
        h.wfile.write(b"{")
        h.close_connection = True

    with serving(reply) as (url, _):
        assert drive(url, 1).tally.failed == 1
    with serving(reply) as (gone, _):
        pass
    assert drive(gone, 1).tally.failed == 1  # nobody listens there any more


def test_every_request_opens_its_own_connection() -> None:
    ports: set[int] = set()

    def reply(h: Handler, body: dict[str, object], n: int) -> None:
        ports.add(h.client_address[1])
        h.answer(body, TASK.expected)

    with serving(reply) as (url, _):
        drive(url, 6)
    assert len(ports) == 6


def test_stop_lets_what_is_under_way_finish() -> None:
    started, go_on = threading.Event(), threading.Event()

    def reply(h: Handler, body: dict[str, object], n: int) -> None:
        started.set()
        assert go_on.wait(10)
        h.answer(body, TASK.expected)

    with serving(reply) as (url, _):
        load = Load(url, "tiny", [TASK], clients=1).start()
        assert started.wait(10)
        threading.Timer(0.1, go_on.set).start()
        tally = load.stop()
    assert (tally.sent, tally.right) == (1, 1)


def test_the_load_ends_by_time() -> None:
    with serving(lambda h, body, n: h.answer(body, TASK.expected)) as (url, _):
        load = drive(url, 10**6, max_seconds=0.3)
    assert not load.running
    assert load.tally.sent == load.tally.right > 0
