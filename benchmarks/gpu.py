"""A sitting: engines side by side on one GPU, on the public workloads, beside the machine's limit.

    python benchmarks/gpu.py --out rows.jsonl --site PEERS --budget 580 --part vllm-8b octavo-8b
    python benchmarks/gpu.py --out rows.jsonl --engine octavo --shape llama-8b --load single
    python benchmarks/gpu.py --out rows.jsonl --table NAME

Each part has a time box and runs in processes of its own; one that fails or takes too long says so
in a row, and the rest goes on. Rows are appended, one JSON line a measurement; only rows of one
sitting (one machine, one lifetime of it) may be compared, over several calls with the same
`--sitting`. The machine's ceilings are measured first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from sitting import Serving, Sitting
from sitting_parts import (
    BIG,
    SMALL,
    USUAL,
    Part,
    measure_ceilings,
    measured,
    offline,
    parts,
    run_part,
)
from sitting_table import tables

from octavo.bench.workloads import SHAPES, WORKLOADS

# Room in memory for a checkpoint of the big model beside everything else.
SHM_BYTES = 40 << 30


def default_scratch() -> Path:
    """In memory where there is room for a checkpoint: it is read from the page cache either way.

    What an earlier call of the sitting chose is kept.
    """
    memory, disk = Path("/dev/shm/octavo-sitting"), Path("/tmp/octavo-sitting")
    for folder in (memory, disk):
        if folder.is_dir():
            return folder
    roomy = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free >= SHM_BYTES
    return memory if roomy else disk


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="rows are appended to this file")
    add("--part", nargs="+", choices=parts(), help="in this order (with --budget: all)")
    add("--budget", type=float, metavar="SECONDS", help="for everything; what is beyond is skipped")
    add("--big", default=BIG, metavar="SHAPE", help="a shape or a folder (default %(default)s)")
    add("--small", default=SMALL, metavar="SHAPE", help="likewise (default %(default)s)")
    add("--once", action="store_true", help="not what the sitting has measured in an earlier call")
    add("--capacity", type=int, default=USUAL.capacity, metavar="REQUESTS", help="at once")
    add("--poisson", type=float, default=USUAL.poisson_s, metavar="SECONDS", help="of arrivals")
    add("--settle", type=float, default=USUAL.settle_s, metavar="SECONDS", help="at most")
    add("--cost", action=argparse.BooleanOptionalAction, default=True, help="of the peer's steps")
    add("--sharing", default="", metavar="WORDS", help="for sharing_gpu.py, in one string")
    add("--engine", action="append", default=[], help="offline alone, in this order")
    add("--shape", action="append", choices=SHAPES)
    add("--load", nargs="+", choices=WORKLOADS, default=["sharegpt", "single", "prefill"])
    add("--requests", type=int, help="of each workload (default: as many as it has)")
    add("--sitting", default=time.strftime("%Y-%m-%dT%H:%M"))
    add("--commit", default="unknown")
    add("--site", help="folder with the peers' packages")
    add("--scratch", type=Path, default=None, help="for folders of models (default: in memory)")
    add("--table", nargs="*", metavar="SITTING", help="print what the file holds of these, or all")
    return parser.parse_args()


def serving_of(args: argparse.Namespace) -> Serving:
    return Serving(args.capacity, args.poisson, args.settle)


def chosen(args: argparse.Namespace) -> dict[str, Part]:
    """The parts that were asked for, in the order in which they are to run."""
    every = parts(
        args.big,
        args.small,
        serving=serving_of(args),
        cost=args.cost,
        sharing=shlex.split(args.sharing),
    )
    if args.part or args.budget:
        return {name: every[name] for name in args.part or every}
    return {
        f"{engine}-{shape}-{turn}": Part(
            600, 0, partial(offline, engine=engine, shape=shape, loads=args.load)
        )
        for shape in args.shape or [BIG, SMALL]
        for turn, engine in enumerate(args.engine)
    }


def main() -> None:
    args = parse()
    # Whoever ends this ends its children too: they lead groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = chosen(args)
    if wanted:
        end = time.perf_counter() + (args.budget or float("inf"))
        stamp = {"sitting": args.sitting, "device": None, "commit": args.commit}
        scratch = args.scratch or default_scratch()
        scratch.mkdir(parents=True, exist_ok=True)
        sitting = Sitting(
            args.out, stamp, scratch, args.site, args.requests, serving=serving_of(args)
        )
        sitting.rows = [row for row in read(args.out) if row["sitting"] == args.sitting]
        measure_ceilings(sitting, end)
        done = measured(sitting.rows) if args.once else set()
        for name, part in wanted.items():
            if name not in done:
                run_part(sitting, name, part, end)
    if args.table is not None:
        print(tables([r for r in read(args.out) if r["sitting"] in args.table or not args.table]))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
