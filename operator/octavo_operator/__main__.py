"""`octavo-operator`: read the settings, set up logging, run until told to end."""

from __future__ import annotations

import asyncio
import functools
import logging

import kopf

from octavo_operator import config as configuration
from octavo_operator.app import App
from octavo_operator.cluster import Cluster, connect
from octavo_operator.handlers import build_registry
from octavo_operator.metrics import Metrics


def main() -> None:
    """The command."""
    config = configuration.load()
    log_format = kopf.LogFormat.JSON if config.log_format == "json" else kopf.LogFormat.FULL
    kopf.configure(debug=config.debug, log_format=log_format)
    if not config.debug:
        # A line for each event of each watched object says nothing that a reconcile does not.
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    asyncio.run(run(App(config, functools.partial(_cluster, config)), config))


async def run(app: App, config: configuration.Config) -> None:
    """Run one operator until SIGTERM, SIGINT or cancellation."""
    await kopf.operator(
        registry=build_registry(app, config),
        standalone=True,
        clusterwide=not config.namespaces,
        namespaces=config.namespaces,
    )


def _cluster(config: configuration.Config, metrics: Metrics) -> Cluster:
    return Cluster(connect(), metrics, config.instance)


if __name__ == "__main__":
    main()
