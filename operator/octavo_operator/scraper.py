"""Reads the load of replicas over HTTP, directly from their pods."""

from __future__ import annotations

import json
from collections.abc import Callable

import aiohttp

from octavo_operator.autoscale import Load, LoadError, parse_load
from octavo_operator.resources import PORT

LOAD_PATH = "/octavo/load"
TIMEOUT_SECONDS = 2.0
MAX_BYTES = 1 << 20
PARALLEL = 64


class ScrapeError(Exception):
    """A replica did not answer, or not with a load document."""


def pod_url(ip: str) -> str:
    """Where a pod tells its load."""
    host = f"[{ip}]" if ":" in ip else ip
    return f"http://{host}:{PORT}{LOAD_PATH}"


class Scraper:
    """One HTTP session for all replicas; open it inside the event loop that uses it."""

    def __init__(self, url_of: Callable[[str], str] = pod_url) -> None:
        self._url_of = url_of
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
            connector=aiohttp.TCPConnector(limit=PARALLEL),
            # Pods are asked directly: a proxy of the environment does not know them.
            trust_env=False,
        )

    async def load(self, ip: str) -> Load:
        """The load of the replica at this address; raises ScrapeError."""
        url = self._url_of(ip)
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise ScrapeError(f"{url} answered {response.status}")
                return parse_load(json.loads(await _body(response)))
        except (aiohttp.ClientError, TimeoutError, LoadError, ValueError, RecursionError) as error:
            raise ScrapeError(f"{url}: {str(error) or type(error).__name__}") from error

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body, unless a broken replica sends without end."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:
            raise ScrapeError(f"{response.url} answered with more than {MAX_BYTES} bytes")
    return bytes(body)
