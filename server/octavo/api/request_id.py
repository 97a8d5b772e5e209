"""X-Request-Id: taken from the client when harmless, made up otherwise, always echoed."""

from __future__ import annotations

from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.api.limits import MAX_REQUEST_ID_CHARS

_HEADER = b"x-request-id"


class RequestIdMiddleware:
    """Adds the header to every response, errors and streams included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (_HEADER, request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        printable = all(0x20 < byte < 0x7F for byte in value)
        if name == _HEADER and printable and 0 < len(value) <= MAX_REQUEST_ID_CHARS:
            return bytes(value)
    return uuid4().hex.encode()
