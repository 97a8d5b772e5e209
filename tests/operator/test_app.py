"""Flags, the small HTTP endpoint, and what an event sets in motion."""

import asyncio
from typing import Any

import aiohttp
import llmservices
import pytest

from octavo_operator.app import App
from octavo_operator.config import DEFAULT_SERVER_IMAGE, Config, load
from octavo_operator.resources import build_children


class NoCluster:
    """A cluster that no request may reach."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_flags_and_environment() -> None:
    assert load([], {}).server_image == DEFAULT_SERVER_IMAGE
    assert load([], {"OCTAVO_SERVER_IMAGE": "a:1"}).server_image == "a:1"
    found = load(["--server-image", "b:2"], {"OCTAVO_SERVER_IMAGE": "a:1", "POD_NAME": "op-0"})
    assert (found.server_image, found.instance) == ("b:2", "op-0")
    found = load(["--namespace", "a", "--namespace=b", "--http-port=1", "--log-format=json"], {})
    assert (found.namespaces, found.http_port, found.log_format) == (("a", "b"), 1, "json")


@pytest.mark.parametrize("argv", [["--nonsense"], ["--name", "a"], ["--http-port", "x"]])
def test_wrong_flags_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(argv, {})
    assert "octavo-operator: error" in capsys.readouterr().err


def with_app(check: Any) -> None:
    async def main() -> None:
        cluster = NoCluster()
        app = App(Config(http_port=0), lambda _: cluster)  # type: ignore[arg-type,return-value]
        await app.start()
        try:
            await check(app)
        finally:
            await app.close()
        assert cluster.closed

    asyncio.run(main())


def port(app: App) -> int:
    """Where it listens on IPv4 (port 0 gives each family its own), by the runner started last."""
    (runner,) = (
        callback.__self__
        for _, callback in (
            (sync, getattr(wrapped, "__wrapped__", wrapped))
            for sync, wrapped in app._stack._exit_callbacks
        )
        if isinstance(getattr(callback, "__self__", None), aiohttp.web.AppRunner)
    )
    return next(int(address[1]) for address in runner.addresses if len(address) == 2)


def test_health_and_metrics() -> None:
    async def check(app: App) -> None:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port(app)}") as session:
            async with session.get("/healthz") as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
            app.queue.oldest_seconds = lambda: 301.0  # type: ignore[method-assign]
            async with session.get("/healthz") as answer:
                assert answer.status == 503
                assert "waiting or at work for 301 s" in await answer.text()
            async with session.get("/metrics") as answer:
                text = await answer.text()
        for name in (
            "octavo_operator_reconciles_total",
            "octavo_operator_reconcile_seconds",
            "octavo_operator_api_writes_total",
            "octavo_operator_queue_depth",
            "octavo_operator_scale_decisions_total",
            "octavo_operator_scrape_failures_total",
        ):
            assert f"# TYPE {name.removesuffix('_total')}" in text

    with_app(check)


def test_children_wake_their_service() -> None:
    async def check(app: App) -> None:
        woken: list[str] = []
        app.queue.add = lambda key, delay=0.0: woken.append(key)  # type: ignore[method-assign]
        endpoint, deployment = build_children(llmservices.service(), 1, "img")
        app.saw_child("Deployment", False, llmservices.live(deployment))
        assert woken == [], "the service itself is not known yet"
        app.saw_service(False, llmservices.body())
        app.saw_child("Service", False, llmservices.live(endpoint))
        app.saw_child("Pod", False, llmservices.pod("a"))
        app.saw_child("Pod", True, llmservices.pod("a"))
        app.saw_child("Pod", False, llmservices.pod("b", of="other"))
        assert woken == ["uid-tiny"] * 4
        assert app.cache.pods(("ns", "tiny")) == []
        app.saw_service(True, llmservices.body())
        assert app.cache.service("uid-tiny") is None

    with_app(check)
