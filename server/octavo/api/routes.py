"""The data port's routes: the OpenAI API, probes, metrics and the load report."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from octavo.api.errors import ApiError
from octavo.api.generation import Generation
from octavo.api.http_io import StreamResponse, read_body, whole_response
from octavo.api.lifecycle import State
from octavo.api.load_report import failure_report, load_report, progress_report
from octavo.api.logprobs import LogprobsWriter
from octavo.api.request_id import RequestIdMiddleware
from octavo.api.requests import SamplingBody, StreamOptions, decode_chat, decode_prompts
from octavo.api.serving import Serving
from octavo.api.sse import ChatForm, CompletionForm
from octavo.metrics import CONTENT_TYPE


def build_app(serving: Serving) -> FastAPI:
    """The application for one server."""
    # No documentation pages (not part of the OpenAI surface), and nothing that calls home.
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    _add_errors(app)
    _add_openai(app, serving)
    _add_probes(app, serving)
    app.add_middleware(RequestIdMiddleware)
    return app


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return ApiError(error.status_code, what).response()

    @app.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> Response:
        # The server logs the traceback; the client learns nothing of our insides.
        return ApiError(500, "internal error").response()


def _add_openai(app: FastAPI, serving: Serving) -> None:
    started = int(time.time())

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        serving.require_serving()
        body = await read_body(request, decode_chat)
        model = serving.model_name(body.model)
        generation = await serving.start_chat(body)
        return await _answer(request, body, generation, ChatForm, model, serving.logprobs)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        serving.require_serving()
        body, prompts = await read_body(request, decode_prompts)
        model = serving.model_name(body.model)
        generation = await serving.start_completion(body, prompts)
        return await _answer(request, body, generation, CompletionForm, model, serving.logprobs)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        engine = serving.lifecycle.engine
        names = serving.config.served_model_names
        cards = [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "octavo",
                "root": names[0],
                "parent": None,
                "max_model_len": engine.max_model_len if engine else None,
            }
            for name in names
        ]
        return _json({"object": "list", "data": cards})


async def _answer(
    request: Request,
    body: SamplingBody,
    generation: Generation,
    form: type[ChatForm] | type[CompletionForm],
    model: str,
    logprobs: LogprobsWriter | None,
) -> Response:
    options = body.stream_options or StreamOptions()
    writer = form(generation.request_id, model, usage_null=options.include_usage, writer=logprobs)
    if body.stream:
        return StreamResponse(generation, writer, options)
    return await whole_response(request, generation, writer)


def _add_probes(app: FastAPI, serving: Serving) -> None:
    life = serving.lifecycle

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return Response(status_code=200 if life.serving else 503)

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        report = {"state": life.state.value} | failure_report(life)
        return _json(report, 200 if life.serving else 503)

    @app.get("/livez", response_model=None)
    async def livez() -> Response:
        if life.hung:
            return _json({"live": False, "message": "the engine has work and makes no step"}, 503)
        return _json({"live": True})

    @app.get("/startupz", response_model=None)
    async def startupz() -> Response:
        report = progress_report(life) | {"seconds": life.start_seconds}
        return _json(report, 503 if life.state is State.STARTING else 200)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(serving.metrics.expose(), headers={"content-type": CONTENT_TYPE})

    @app.get("/octavo/load", response_model=None)
    async def load() -> Response:
        return _json(load_report(life, serving.engine.in_flight))
