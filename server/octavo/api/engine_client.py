"""The API's end of the wire: sends requests to the engine, hands its outputs to their owners."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import zmq

from octavo.wire import (
    AbortRequest,
    AddRequest,
    Outputs,
    Stop,
    ToApi,
    ToEngine,
    TokenOutput,
    encoder,
    to_api_decoder,
)

REQUESTS_SOCKET = "requests.sock"
EVENTS_SOCKET = "events.sock"
# How long a closing socket may still deliver a Stop.
LINGER_MS = 500
# Messages read in one turn: where the API falls behind, what they hold is sent together.
MAX_MESSAGES_AT_ONCE = 64


# One is made for each token, and it can be part of no cycle.
class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One output, whose it is (the index of the choice) and when it came (monotonic seconds)."""

    index: int
    output: TokenOutput
    at: float


@dataclass(slots=True, eq=False)
class Mailbox:
    """Where the outputs of one HTTP request wait; taking empties it, so slow readers coalesce.

    Whoever puts outputs in calls `notify` when the last of them are there.
    """

    _arrivals: list[Arrival] = field(default_factory=list)
    _waiting: asyncio.Event = field(default_factory=asyncio.Event)
    _reader: Callable[[], None] | None = None

    def put(self, arrival: Arrival) -> bool:
        """Add an output; True if it is the first since the mailbox was emptied."""
        self._arrivals.append(arrival)
        return len(self._arrivals) == 1

    def notify(self) -> None:
        """Call the reader at once, or wake the task that takes."""
        if self._reader is not None:
            self._reader()
        else:
            self._waiting.set()

    def empty(self) -> list[Arrival]:
        """Take what is there."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    async def take(self) -> list[Arrival]:
        """Wait for at least one output; return all that are there."""
        while not self._arrivals:
            self._waiting.clear()
            await self._waiting.wait()
        return self.empty()

    @contextlib.contextmanager
    def read_by(self, reader: Callable[[], None]) -> Iterator[None]:
        """Have `reader` called with every notification, in the turn of the loop that brings it."""
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None


@dataclass(slots=True)
class _Owner:
    """Who waits for a request's samples, and which of these are still to end.

    Sample number s is choice number `first` + s.
    """

    mailbox: Mailbox
    first: int
    open: set[int]


class EngineClient:
    """Both sockets and the table of requests that the engine holds.

    An id leaves the table with the final outputs of all its samples or with its abort; outputs
    that come later are dropped, so that an owner sees exactly one final output for each sample.
    """

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        # Sends are synchronous: the high-water mark is off, so they only ever append to a queue.
        self._requests = self._context.socket(zmq.PUSH)
        self._requests.setsockopt(zmq.SNDHWM, 0)
        self._requests.setsockopt(zmq.LINGER, LINGER_MS)
        self._requests.bind(f"ipc://{folder / REQUESTS_SOCKET}")
        self._events = self._context.socket(zmq.PULL)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.bind(f"ipc://{folder / EVENTS_SOCKET}")
        self._owners: dict[str, _Owner] = {}
        self._gone: str | None = None

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet finished."""
        return len(self._owners)

    def submit(self, request: AddRequest, mailbox: Mailbox, first: int) -> None:
        """Send a request; its samples' outputs will arrive in `mailbox`, numbered from `first`."""
        samples = set(range(request.params.num_outputs))
        self._owners[request.request_id] = _Owner(mailbox, first, samples)
        if self._gone is not None:
            self.fail_all(self._gone)
        else:
            self._send(request)

    def abort(self, request_id: str, sample: int) -> None:
        """Forget a sample and tell the engine to free its blocks; unknown ones do nothing."""
        if self._ends(request_id, sample):
            self._send(AbortRequest(request_id, sample))

    def _ends(self, request_id: str, sample: int) -> bool:
        """Take a sample out of the table; False if it is not there."""
        owner = self._owners.get(request_id)
        if owner is None or sample not in owner.open:
            return False
        owner.open.remove(sample)
        if not owner.open:
            del self._owners[request_id]
        return True

    def stop(self) -> None:
        """Ask the engine process to end."""
        self._send(Stop())

    def fail_all(self, message: str) -> None:
        """End every request, also those still to come, with an error: the engine is gone."""
        self._gone = message
        now = time.monotonic()
        for request_id, owner in list(self._owners.items()):
            for sample in sorted(owner.open):
                output = TokenOutput(request_id, [], "error", error=message, index=sample)
                owner.mailbox.put(Arrival(owner.first + sample, output, now))
            owner.mailbox.notify()
        self._owners.clear()

    async def messages(self) -> AsyncIterator[ToApi]:
        """Every message of the engine; outputs have reached their owners by then."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        signal = cast(int, self._events.getsockopt(zmq.FD))
        loop.add_reader(signal, readable.set)
        try:
            while True:
                messages = self._receive()
                for message in messages:
                    yield message
                if len(messages) == MAX_MESSAGES_AT_ONCE:
                    # More may be there; a fast engine must not keep everybody else from running.
                    await asyncio.sleep(0)
                    continue
                # ZeroMQ signals a change, not a state: wait only after a receive found nothing.
                await readable.wait()
                readable.clear()
        finally:
            loop.remove_reader(signal)

    def close(self) -> None:
        """Close both sockets."""
        self._events.close(linger=0)
        self._requests.close()
        self._context.term()

    def _receive(self) -> list[ToApi]:
        """What has come, a bounded number of messages; their outputs are with their owners."""
        messages: list[ToApi] = []
        touched: list[Mailbox] = []
        with contextlib.suppress(zmq.Again):
            while len(messages) < MAX_MESSAGES_AT_ONCE:
                message = to_api_decoder.decode(self._events.recv(zmq.NOBLOCK))
                messages.append(message)
                if isinstance(message, Outputs):
                    touched += self._deliver(message, time.monotonic())
        for mailbox in touched:
            mailbox.notify()
        return messages

    def _deliver(self, message: Outputs, now: float) -> list[Mailbox]:
        """Put outputs into their mailboxes; return those that were empty before."""
        touched = []
        for output in message.outputs:
            owner = self._owners.get(output.request_id)
            if owner is None or output.index not in owner.open:
                continue
            if output.finish_reason is not None:
                self._ends(output.request_id, output.index)
            if owner.mailbox.put(Arrival(owner.first + output.index, output, now)):
                touched.append(owner.mailbox)
        return touched

    def _send(self, message: ToEngine) -> None:
        try:
            self._requests.send(encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # No engine is connected. Whoever notices its death fails the requests.
            return
