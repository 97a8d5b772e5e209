"""The `octavo` command: starts fast, imports a subcommand's code only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from octavo import __version__
from octavo.config import (
    Parser,
    add_serve_arguments,
    reject_unknown,
    serve_config,
    termination_log,
)
from octavo.errors import ConfigError, ExitCode


def build_parser() -> argparse.ArgumentParser:
    """The command's parser: one subparser for each subcommand."""
    parser = Parser(prog="octavo", description="An LLM serving engine with a paged KV cache.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible API")
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve, parser=serve)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version, parser=version)
    return parser


def _serve(args: argparse.Namespace) -> int:
    config = serve_config(args)
    from octavo.api.server import serve  # heavy: the web stack

    return serve(config)


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit code."""
    try:
        args, unknown = build_parser().parse_known_args(argv)
        reject_unknown(unknown, args.parser)
        code: int = args.run(args)
    except ConfigError as error:
        return _refuse(str(error))
    return code


def _refuse(message: str) -> int:
    """Say what is wrong where a person and Kubernetes will look."""
    print(f"octavo: {message}", file=sys.stderr)
    try:
        with open(termination_log(), "w") as log:
            log.write(message)
    except OSError:
        pass  # outside Kubernetes there is no such file, and stderr has the message
    return ExitCode.CONFIG


if __name__ == "__main__":
    sys.exit(main())
