"""How kopf is set up: only event handlers, nothing that writes, nothing that gives up."""

import itertools
import logging

import kopf

from octavo_operator import handlers
from octavo_operator.app import App
from octavo_operator.config import Config


def never_connect(_: object) -> None:
    raise AssertionError("not needed")


def build(config: Config | None = None) -> kopf.OperatorRegistry:
    config = config or Config()
    return handlers.build_registry(App(config, never_connect), config)  # type: ignore[arg-type]


def test_there_are_only_event_handlers() -> None:
    """Any other kind makes kopf put a finalizer or an annotation on the user's object."""
    registry = build()
    watched = {handler.selector.any_name or handler.selector.plural
               for handler in registry._watching.get_all_handlers()}  # fmt: skip
    assert watched == {"llmservices", "deployments", "services", "pods"}
    for other in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert list(other.get_all_handlers()) == []


def test_settings_for_a_long_life() -> None:
    settings = kopf.OperatorSettings()
    handlers.configure(settings, Config(instance="me"))
    assert settings.networking.enforce_retry_after
    assert settings.networking.request_timeout == 60
    assert settings.watching.server_timeout == 300
    assert settings.queueing.worker_limit is None
    assert settings.posting.loggers is False
    assert settings.posting.level == logging.WARNING
    assert settings.posting.reporting_instance == "me"
    assert settings.persistence.finalizer.startswith("octavo.dev/")
    assert settings.peering.standalone
    assert settings.scanning.disabled is False
    assert len(settings.watching.label_selectors) == 3


def test_one_namespace_needs_no_rights_in_the_cluster() -> None:
    settings = kopf.OperatorSettings()
    handlers.configure(settings, Config(namespaces=("a",)))
    assert settings.scanning.disabled is True


def test_retries_never_end_and_are_jittered() -> None:
    backoff = handlers.EndlessBackoff()
    first = list(itertools.islice(backoff, 200))
    for delay, middle in zip(first, [1, 2, 4, 8, *[15] * 196], strict=True):
        assert 0.8 * middle <= delay <= 1.2 * middle
    assert len(set(first[4:])) > 100
    assert next(iter(backoff)) <= 1.2, "each request starts anew"
