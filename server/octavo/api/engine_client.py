"""The API's end of the wire: sends requests to the engine, hands its outputs to their owners."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

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


@dataclass(frozen=True, slots=True)
class Arrival:
    """One output, whose it is (the index of the choice) and when it came (monotonic seconds)."""

    index: int
    output: TokenOutput
    at: float


@dataclass(slots=True)
class Mailbox:
    """Where the outputs of one HTTP request wait; taking empties it, so slow readers coalesce."""

    _arrivals: list[Arrival] = field(default_factory=list)
    _waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, arrival: Arrival) -> None:
        """Add an output and wake the owner."""
        self._arrivals.append(arrival)
        self._waiting.set()

    async def take(self) -> list[Arrival]:
        """Wait for at least one output; return all that are there."""
        await self._waiting.wait()
        arrivals, self._arrivals = self._arrivals, []
        self._waiting.clear()
        return arrivals


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
        self._events = zmq.asyncio.Context.shadow(self._context).socket(zmq.PULL)
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
        self._owners.clear()

    async def messages(self) -> AsyncIterator[ToApi]:
        """Every message of the engine; outputs have reached their owners by then."""
        while True:
            message = to_api_decoder.decode(await self._events.recv())
            if isinstance(message, Outputs):
                self._deliver(message, time.monotonic())
            yield message
            # A receive that finds a message does not pause; without this, a fast engine would
            # keep the owners of its outputs from ever running.
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close both sockets."""
        self._events.close(linger=0)
        self._requests.close()
        self._context.term()

    def _deliver(self, message: Outputs, now: float) -> None:
        for output in message.outputs:
            owner = self._owners.get(output.request_id)
            if owner is None or output.index not in owner.open:
                continue
            if output.finish_reason is not None:
                self._ends(output.request_id, output.index)
            owner.mailbox.put(Arrival(owner.first + output.index, output, now))

    def _send(self, message: ToEngine) -> None:
        try:
            self._requests.send(encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # No engine is connected. Whoever notices its death fails the requests.
            return
