"""Products of 17 to 512 rows by our kernel that cuts all tiles into equal shares, and which cuts
are worth a try (`stream_gemm.h`).

A plan stands among cuBLASLt's algorithms, in as many bytes, and `cuda_tune.py` compares them.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import address, profile, stream_of, type_code

# Of so many rows the search tries this kernel. Measurements set it.
tried_rows = range(0)

# In the order of skinny_gemm.h's Epilogue.
STORE, ADD, GATED = range(3)
_MIN_ROWS, _MAX_ROWS = 17, 512
_WIDTHS = (32, 64, 128, 192, 256)
_TILE, _DEPTH = 256, 64  # rows of a weight in a tile, columns in a step
_ALIGNMENT = 16  # bytes
_FORMAT = struct.Struct("<48s8xii")
_NAME = b"octavo stream_gemm"
# Of a multiprocessor of an H100, by a microsecond: columns of a step multiplied, bytes from the L2
# cache and its share of memory; what parts put together cost besides their bytes.
_COLUMNS_US, _L2_BYTES_US, _MEMORY_BYTES_US = 400.0, 42e3, 23e3
_TOGETHER_US = 2.5


class Plan(NamedTuple):
    """How a product is cut: rows of x to a tile, shares of two blocks for each tile of rows."""

    width: int
    shares: int


def encoded(plan: Plan) -> bytes:
    """The plan in the bytes of an algorithm."""
    return _FORMAT.pack(_NAME, *plan)


def plan_of(algorithm: bytes | None) -> Plan | None:
    """The plan that those bytes are; None where they are the library's."""
    if algorithm is None or not algorithm.startswith(_NAME):
        return None
    _, width, shares = _FORMAT.unpack(algorithm)
    return Plan(width, shares)


def serves(rows: int, n: int, k: int) -> bool:
    """Whether there is a kernel for the size (on a Hopper GPU)."""
    return _MIN_ROWS <= rows <= _MAX_ROWS and n >= 64 and n % 64 == 0 and k >= 64 and k % 64 == 0


def candidates(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, count: int
) -> list[bytes]:
    """The plans, as algorithms, that should be fastest; none while this is off."""
    rows, (n, k) = len(x), weight.shape
    if profile.deterministic or rows not in tried_rows or not serves(rows, n, k):
        return []
    if not aligned(x, weight, out) or (pairs := pairs_of(x.device)) == 0:
        return []
    _workspace(x.device)  # not first while a graph is captured
    return [encoded(plan) for plan in plans(rows, n, k, pairs)[:count]]


def ready(plan: Plan, rows: int, device: torch.device) -> bool:
    """Whether the device can run all blocks of a plan from a file at once; then its workspace is
    made too, which cannot first be while a graph is captured.
    """
    if -(-rows // plan.width) * plan.shares > pairs_of(device):
        return False
    _workspace(device)
    return True


def plans(rows: int, n: int, k: int, pairs: int) -> list[Plan]:
    """Cuts for so many pairs of blocks at once, what should be fastest first: all shares alike
    over every pair, or so that no tile is cut or each into the same number.
    """
    tiles, steps = -(-n // _TILE), k // _DEPTH
    made = set()
    for width in _WIDTHS:
        row_tiles = -(-rows // width)
        most = min(pairs // row_tiles, tiles * steps)
        shares = {most, min(tiles, most)} | {most // tiles * tiles}
        shares |= {tiles // turns for turns in range(1, 5) if tiles % turns == 0}
        made |= {Plan(width, count) for count in shares if 0 < count <= most}
    return sorted(made, key=lambda plan: (_microseconds(plan, tiles, steps), plan))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: Plan,
    *,
    epilogue: int = STORE,
) -> None:
    """One launch of the kernel."""
    partials, arrivals = _workspace(x.device)
    _cuda.stream_gemm(
        dtype=type_code("stream_gemm", x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        w=weight.data_ptr(),
        bias=address(bias),
        out=out.data_ptr(),
        rows=x.shape[0],
        n=weight.shape[0],
        k=x.shape[1],
        epilogue=epilogue,
        width=plan.width,
        shares=plan.shares,
        partials=partials.data_ptr(),
        arrivals=arrivals.data_ptr(),
        stream=stream_of(x),
    )


def aligned(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the tensors lie as the kernel reads and writes them."""
    places = x.data_ptr() | weight.data_ptr() | out.data_ptr() | x.stride(0) * x.element_size()
    return places % _ALIGNMENT == 0 and weight.is_contiguous() and out.is_contiguous()


def _microseconds(plan: Plan, tiles: int, steps: int) -> float:
    """About what it takes: its order among others is what matters."""
    width, shares = plan
    weight_bytes, x_bytes = _TILE // 2 * _DEPTH * 2, width * _DEPTH * 2
    # Half of what a block reads of x its neighbour brings; w comes from memory once.
    step = max(
        width / _COLUMNS_US,
        (weight_bytes + x_bytes / 2) / _L2_BYTES_US,
        weight_bytes * shares * 2 / 132 / _MEMORY_BYTES_US,
    )
    total = -(-tiles * steps // shares) * step
    if tiles * steps % shares or (tiles * steps // shares) % steps:  # some tile is cut
        part_bytes = width * _TILE // 2 * 4
        total += _TOGETHER_US + 2 * part_bytes / _L2_BYTES_US
    return total


@functools.cache
def pairs_of(device: torch.device) -> int:
    """Pairs of blocks that the device runs at once; 0: it has no kernel."""
    return _cuda.stream_gemm_pairs(device.index or 0)


@functools.cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where parts meet: one stream at a time uses it."""
    pairs = pairs_of(device)
    partials = torch.empty(_cuda.stream_gemm_partial_bytes(pairs), dtype=torch.uint8, device=device)
    arrivals = torch.zeros(_cuda.stream_gemm_arrivals(pairs), dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return partials, arrivals
