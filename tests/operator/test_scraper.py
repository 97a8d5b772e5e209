"""Reading replicas over real HTTP: good answers, bad answers, silence."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from octavo_operator import scraper as scrapers
from octavo_operator.autoscale import Load
from octavo_operator.scraper import ScrapeError, Scraper, pod_url

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
READY = {"state": "Ready", "blocks": {"total": 10, "active": 4}, "waiting_blocks": 2}


def scrape(handler: Handler) -> Load:
    """What a scraper makes of a server with this handler."""

    async def main() -> Load:
        server = web.Application()
        server.router.add_get("/octavo/load", handler)
        runner = web.AppRunner(server)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        scraper = Scraper(lambda ip: f"http://{ip}:{port}/octavo/load")
        try:
            return await scraper.load("127.0.0.1")
        finally:
            await scraper.close()
            await runner.cleanup()

    return asyncio.run(main())


def answering(body: Any, status: int = 200) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status)

    return handler


def test_a_load() -> None:
    assert scrape(answering(READY)) == Load("Ready", 10, 4, 2)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (READY, 503, "answered 503"),
        ("not json", 200, "Expecting value"),
        ({"state": "?"}, 200, "state is '\\?'"),
        ("[" * 100_000, 200, "octavo/load"),
        ("x" * (scrapers.MAX_BYTES + 1), 200, "more than"),
    ],
)
def test_bad_answers_are_one_kind_of_error(body: Any, status: int, said: str) -> None:
    with pytest.raises(ScrapeError, match=said):
        scrape(answering(body, status))


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapers, "TIMEOUT_SECONDS", 0.2)

    async def never(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1)
        return web.Response()

    with pytest.raises(ScrapeError, match="Timeout"):
        scrape(never)


def test_nobody_listens() -> None:
    async def main() -> None:
        scraper = Scraper(lambda _: "http://127.0.0.1:1/octavo/load")
        try:
            with pytest.raises(ScrapeError, match=r"127\.0\.0\.1:1"):
                await scraper.load("x")
        finally:
            await scraper.close()

    asyncio.run(main())


def test_redirects_are_not_followed() -> None:
    async def away(_: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/elsewhere")

    with pytest.raises(ScrapeError, match="answered 302"):
        scrape(away)


def test_addresses() -> None:
    assert pod_url("10.0.0.1") == "http://10.0.0.1:8000/octavo/load"
    assert pod_url("fd00::1") == "http://[fd00::1]:8000/octavo/load"
