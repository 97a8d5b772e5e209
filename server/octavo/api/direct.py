"""Stream events straight to their socket: one write each, through no task and no ASGI message.

ASGI begins and ends a response and carries it while the client reads too slowly; between, a chunk
of a body is framed here. The framing keeps no state, so that both may write in turn.
"""

from __future__ import annotations

import asyncio
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

_EXTENSION = "octavo.direct"


class DirectWriter:
    """Writes chunks of a response whose head is out (RFC 9112, section 7.1)."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    def write(self, body: bytes) -> bool:
        """Write one chunk; False if the socket takes no more for now, or never again."""
        # One that closes first sends what waits in it, and ASGI goes on writing: so must this.
        if self._transport.is_closing() and not self._transport.get_write_buffer_size():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return not self._flow.write_paused

    def abort(self) -> None:
        """Drop the connection with what its client does not read: closing would wait for that."""
        self._transport.abort()


class DirectProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with a way to the socket for the requests that come over it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note the writer in the scope of each request on this connection."""
        super().connection_made(transport)
        app, writer = cast(ASGIApp, self.app), DirectWriter(transport, self.flow)

        async def with_writer(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("extensions", {})[_EXTENSION] = writer
            await app(scope, receive, send)

        self.app = with_writer


def direct_writer(scope: Scope) -> DirectWriter | None:
    """The way to the client's socket; None where bodies have no chunks or another server runs."""
    return _writer(scope) if scope.get("http_version") == "1.1" else None


def hang_up(scope: Scope) -> None:
    """End the connection at once, for a client that does not read."""
    if (writer := _writer(scope)) is not None:
        writer.abort()


def _writer(scope: Scope) -> DirectWriter | None:
    return cast("DirectWriter | None", scope.get("extensions", {}).get(_EXTENSION))
