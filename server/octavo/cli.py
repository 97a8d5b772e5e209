"""The `octavo` command: starts fast, imports a subcommand's code only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from octavo import __version__
from octavo.bench.command import add_bench_arguments
from octavo.config import (
    Parser,
    add_plan_arguments,
    add_serve_arguments,
    check_plan_arguments,
    reject_unknown,
    serve_config,
    termination_log,
)
from octavo.errors import ExitCode, OctavoError
from octavo.ledger import GPU_MIB, Request, as_text, make_ledger, remedies
from octavo.model_shape import read_shape
from octavo.plan import DTYPE_BYTES, GIB, MIB, weights_bytes


def build_parser() -> argparse.ArgumentParser:
    """The command's parser: one subparser for each subcommand."""
    parser = Parser(prog="octavo", description="An LLM serving engine with a paged KV cache.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible API")
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve, parser=serve)
    plan = commands.add_parser("plan", help="say whether a model fits on a GPU, from its headers")
    add_plan_arguments(plan, sorted(GPU_MIB))
    plan.set_defaults(run=_plan, parser=plan)
    bench = commands.add_parser("bench", help="measure an engine, or a server under load")
    add_bench_arguments(bench)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version, parser=version)
    return parser


def _serve(args: argparse.Namespace) -> int:
    config = serve_config(args)
    from octavo.api.launch import serve

    return serve(config)


def _plan(args: argparse.Namespace) -> int:
    check_plan_arguments(args)
    folder = Path(args.model)
    shape = read_shape(folder)
    weights = {
        dtype: weights_bytes(folder, dtype, tied=shape.tied_embeddings) for dtype in DTYPE_BYTES
    }
    request = Request(
        total_bytes=GPU_MIB[args.gpu] * MIB if args.gpu else int(args.gpu_memory * GIB),
        dtype=shape.dtype if args.dtype == "auto" else args.dtype,
        max_model_len=args.max_model_len or shape.max_positions,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    ledger = make_ledger(shape, weights[request.dtype], request)
    ways = [] if ledger.fits else list(remedies(shape, weights, request))
    if args.json:
        print(json.dumps({**ledger.as_json(), "dtype": request.dtype, "would_fit_with": ways}))
    else:
        device = args.gpu or f"{args.gpu_memory:g} GiB"
        title = f"{args.model} ({shape.architecture}, {request.dtype}) on {device}"
        print(as_text(title, ledger, ways))
    return ExitCode.OK if ledger.fits else ExitCode.CONFIG


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit code."""
    try:
        args, unknown = build_parser().parse_known_args(argv)
        reject_unknown(unknown, args.parser)
        code: int = args.run(args)
    except OctavoError as error:
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
