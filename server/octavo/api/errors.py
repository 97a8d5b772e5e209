"""Errors as clients of the OpenAI API expect them: one JSON shape, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from octavo.api.limits import MAX_ERROR_CHARS

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """Ends a request with `status` and an OpenAI error body; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = (
            message if len(message) <= MAX_ERROR_CHARS else message[:MAX_ERROR_CHARS] + "…"
        )
        self.param = param
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON body, also used as the error event of a stream."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "BadRequestError"),
            "param": self.param,
            "code": self.status,
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The HTTP response; a retryable error says when to come back."""
        headers: Mapping[str, str] = {}
        if self.retry_after is not None:
            headers = {"retry-after": str(self.retry_after)}
        return Response(self.body(), self.status, headers, media_type="application/json")


def engine_error(message: str) -> ApiError:
    """The request was lost through no fault of its own; sending it again is right."""
    return ApiError(
        500, f"{message}; the request was not finished and may be sent again", retry_after=1
    )
