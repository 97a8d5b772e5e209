"""The operator's settings: flags and environment are read here and nowhere else."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_SERVER_IMAGE = "octavo-server:latest"


@dataclass(frozen=True)
class Config:
    """What one operator process was started with."""

    server_image: str = DEFAULT_SERVER_IMAGE
    namespaces: tuple[str, ...] = ()
    http_port: int = 8081
    log_format: str = "plain"
    debug: bool = False
    instance: str = "octavo-operator"


def load(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> Config:
    """Read flags and environment; exits with a usage message when they are wrong."""
    env = os.environ if env is None else env
    args = _parser().parse_args(argv)
    return Config(
        server_image=args.server_image or env.get("OCTAVO_SERVER_IMAGE") or DEFAULT_SERVER_IMAGE,
        namespaces=tuple(args.namespace),
        http_port=args.http_port,
        log_format=args.log_format,
        debug=args.debug,
        instance=env.get("POD_NAME") or socket.gethostname(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo-operator", description="Runs LLMServices.", allow_abbrev=False
    )
    parser.add_argument(
        "--namespace",
        action="append",
        default=[],
        help="serve this namespace only; may be repeated (default: the whole cluster)",
    )
    parser.add_argument(
        "--server-image",
        help="image of servers whose object names none (default: $OCTAVO_SERVER_IMAGE)",
    )
    parser.add_argument(
        "--http-port", type=int, default=8081, help="port of /healthz and /metrics (default: 8081)"
    )
    parser.add_argument(
        "--log-format", choices=("plain", "json"), default="plain", help="form of the log lines"
    )
    parser.add_argument("--debug", action="store_true", help="log every step")
    return parser
