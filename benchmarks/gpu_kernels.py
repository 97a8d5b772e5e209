"""The GPU kernels alone: their times beside what memory or the tensor cores of this GPU allow.

    python benchmarks/gpu_kernels.py --part decode           # the shapes that have bars
    python benchmarks/gpu_kernels.py --part decode --sweep   # its settings

One JSON line a measurement; the first one says what the machine does. Times are of replays of a
CUDA graph with many calls in it, over buffers that together are larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import torch
from ceilings import measure
from kernel_decode import decode
from kernel_elementwise import elementwise
from kernel_gemm import gemm
from kernel_layers import layers
from kernel_moe import moe
from kernel_persistent import persistent
from kernel_prefill import prefill
from kernel_sampling import sample
from kernel_timing import Machine

PARTS: dict[str, Callable[[Machine, bool], Iterator[dict[str, object]]]] = {
    "decode": decode,
    "elementwise": elementwise,
    "gemm": gemm,
    "layers": layers,
    "moe": moe,
    "persistent": persistent,
    "prefill": prefill,
    "sampling": sample,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=sorted(PARTS), required=True)
    parser.add_argument("--sweep", action="store_true", help="try settings, not only the defaults")
    args = parser.parse_args()
    machine = measure(1 << 30)
    print(json.dumps({"part": "machine", **machine.as_json()}), flush=True)
    for part in args.part:
        for row in PARTS[part](machine, args.sweep):
            print(json.dumps({"part": part, **row}), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
