"""The flags of `octavo bench`, and what they start. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.bench.workloads import SHAPES, WORKLOADS, draw
from octavo.config import DEVICES, DTYPES
from octavo.errors import ConfigError, ExitCode


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `octavo bench offline` and `octavo bench serve`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    offline = kinds.add_parser("offline", help="how fast the engine is, without HTTP")
    offline.add_argument(
        "model", metavar="MODEL", help=f"model folder, or random weights: {', '.join(SHAPES)}"
    )
    _add_offline_arguments(offline)
    offline.set_defaults(run=_offline, parser=offline)
    serve = kinds.add_parser("serve", help="load an OpenAI-compatible endpoint, open loop")
    serve.add_argument("url", metavar="URL", help="for example http://127.0.0.1:8000")
    _add_serve_arguments(serve)
    serve.set_defaults(run=_serve, parser=serve)
    for either in (offline, serve):
        either.add_argument("--requests", type=int, metavar="N", help="default: the workload's")
        either.add_argument("--json", metavar="FILE", help="append the figures, a JSON line each")


def _add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", nargs="+", choices=WORKLOADS, default=["sharegpt"])
    add("--repeat", type=int, default=2, metavar="N", help="passes at most (default %(default)s)")
    add(
        "--seconds", type=float, default=float("inf"), metavar="S",
        help="of each workload's passes, of which there are two all the same (default: no bound)",
    )  # fmt: skip
    add("--temperature", type=float, default=1.0)
    add("--device", choices=DEVICES, default="auto")
    add("--dtype", choices=DTYPES, default="auto")
    add("--max-model-len", type=int, metavar="TOKENS")
    add("--max-num-seqs", type=int, default=256, metavar="N")
    add("--max-num-batched-tokens", type=int, metavar="N")
    add("--num-kv-blocks", type=int, metavar="N")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="RATIO")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=False)


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="sharegpt")
    add("--model", required=True, metavar="NAME", help="as the endpoint calls it")
    add("--vocab-size", type=int, required=True, metavar="N", help="token ids stay below")
    add(
        "--rate",
        type=float,
        default=float("inf"),
        metavar="REQ/S",
        help="Poisson arrivals (default: all at once, which measures the capacity)",
    )
    add("--seed", type=int, default=0, help="of the arrivals (default %(default)s)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one answer")


def _offline(args: argparse.Namespace) -> int:
    from octavo.bench.offline import check_count, run_offline  # heavy: torch

    check_count(args.requests, args.repeat, args.seconds)
    options = {
        name: getattr(args, name)
        for name in (
            "device", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            "num_kv_blocks", "gpu_memory_utilization", "enable_prefix_caching",
        )
        if getattr(args, name) is not None
    }  # fmt: skip
    rows = run_offline(
        args.model,
        args.workload,
        count=args.requests,
        repeat=args.repeat,
        seconds=args.seconds,
        temperature=args.temperature,
        options=options,
    )
    _report((row | {"model": args.model} for row in rows), args.json)
    return ExitCode.OK


def _serve(args: argparse.Namespace) -> int:
    if not args.rate > 0:
        raise ConfigError(f"--rate must be above 0 requests a second, got {args.rate:g}")
    try:
        from octavo.bench.load import Target, run_load
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"octavo bench serve needs the package {error.name}: pip install 'octavo[bench]'"
        ) from error
    requests = draw(args.workload, args.vocab_size, args.requests)
    target = Target(args.url.rstrip("/"), args.model, args.timeout)
    row = run_load(target, requests, args.rate, args.seed)
    row = {"metric": "serve", "load": args.workload, "rate": args.rate, **row}
    _report([row | {"model": args.model}], args.json)
    return ExitCode.OK if not row["failed"] else ExitCode.FAILED


def _report(rows: Iterable[Mapping[str, Any]], file: str | None) -> None:
    for row in rows:
        line = json.dumps(row)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if file is not None:
            with Path(file).open("a", encoding="utf-8") as log:
                log.write(line + "\n")
