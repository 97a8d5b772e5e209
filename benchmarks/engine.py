"""The engine's figures on this machine's CPU, each beside its bar.

    python benchmarks/engine.py --part waste,sharing,host,prefix,throughput --requests 64

Ratios are of runs in one process, in turns, medians of five. Results are kept by part in
benchmarks/results/engine.json; benchmarks/README.md says what each figure is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import blocks
import prefix
import torch
import versus
from record import ROOT, circumstances, keep, show

from octavo.config import default_threads

RESULT = ROOT / "benchmarks" / "results" / "engine.json"
PARTS = {
    "waste": blocks.waste,
    "sharing": blocks.sharing,
    "host": blocks.host,
    "prefix": prefix.prefix,
    "throughput": versus.throughput,
}
# Integers: the same on any machine under any load.
EXACT = ("waste", "sharing")
# What makes a figure steady in a minute or two, where nobody says how many.
REQUESTS = {"waste": 1000, "sharing": 64, "host": 0, "prefix": 8, "throughput": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default=",".join(PARTS), help="which, by comma (default: all)")
    parser.add_argument("--requests", type=int, help="requests of each part (default: by part)")
    parser.add_argument("--output", type=Path, default=RESULT, help="the file with the results")
    asked = parser.parse_args()
    names = asked.part.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    threads = default_threads()
    torch.set_num_threads(threads)
    stamp = circumstances(threads)
    missed = 0
    for name in names:
        part = PARTS[name](asked.requests or REQUESTS[name])
        show(part)
        keep(part, stamp, asked.output)
        missed += sum(figure.met is False for figure in part.figures)
        if name not in EXACT and not stamp["quiet"]:
            print(f"  taken at load {stamp['load'][0]}: times are not to be believed")
    print(f"\n{missed} bars missed" if missed else "\nall bars met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
