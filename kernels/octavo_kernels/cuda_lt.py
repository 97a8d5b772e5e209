"""Products by cuBLASLt, with the algorithm that was found fastest for the size.

What was found is in `found`, by size; `cuda_tune.py` searches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import address, stream_of, type_code

WORKSPACE_BYTES = 32 * 2**20  # what torch gives the library on Hopper
# For more rows than this a size takes the algorithm of the next larger one that was searched.
_ROUNDED_ABOVE = 512


class Size(NamedTuple):
    """What an algorithm is chosen by."""

    dtype: str
    bias: bool
    n: int
    k: int
    rows: int


# None where the usual choice is as good: our own kernel for the few rows it takes, else torch's.
found: dict[Size, bytes | None] = {}
# What `found` says of sizes that were not searched: a step asks again for every layer.
_rounded: dict[Size, bytes | None] = {}
_fixed: dict[Size, bytes] = {}
# By which products are added to what is there; None: by none.
_adding: dict[Size, bytes | None] = {}
_workspaces: dict[torch.device, torch.Tensor] = {}


def keep(size: Size, algorithm: bytes | None) -> None:
    """From now on multiply this size so."""
    found[size] = algorithm
    _rounded.clear()


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor | None:
    """x · weight^T + bias by the algorithm that was found for the size; None where none was."""
    algorithm = algorithm_of(size_of(x, weight, bias))
    return None if algorithm is None else run(x, weight, bias, out, algorithm)


def add_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> bool:
    """out += x · weight^T + bias, by the heuristic's first algorithm that serves; False, and
    nothing done, where there is none.
    """
    size = size_of(x, weight, bias)
    if size in _adding:
        algorithm = _adding[size]
        return algorithm is not None and run(x, weight, bias, out, algorithm, add=True) is not None
    for offered in candidates(x, weight, bias, out, count=4, split=True, add=True):
        if run(x, weight, bias, out, offered, add=True) is not None:
            _adding[size] = offered
            return True
    _adding[size] = None
    return False


def fixed_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """x · weight^T + bias by one algorithm whatever the rows, without sums of parts of k: each row
    of the result then has the same bits in any batch.

    The heuristic chooses, not a clock: the bits are the same after the next start too.
    """
    size = size_of(x, weight, bias)._replace(rows=0)
    if size not in _fixed:
        _fixed[size] = _fixed_algorithm(x, weight, bias)
    result = run(x, weight, bias, out, _fixed[size])
    if result is None:
        raise RuntimeError(
            f"linear: cuBLASLt's algorithm for weights {tuple(weight.shape)} does not take "
            f"{len(x)} rows; --deterministic cannot be kept for this model"
        )
    return result


def algorithm_of(size: Size) -> bytes | None:
    """What was found for it; None where that is the usual choice, or nothing was searched."""
    if size in found or size.rows <= _ROUNDED_ABOVE:
        return found.get(size)
    if size not in _rounded:
        larger = [
            known.rows
            for known in found
            if size.rows < known.rows <= 2 * size.rows and known[:-1] == size[:-1]
        ]
        _rounded[size] = found[size._replace(rows=min(larger))] if larger else None
    return _rounded[size]


def size_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Size:
    """The size of that product."""
    n, k = weight.shape
    return Size(_name_of(weight.dtype), bias is not None, n, k, x.shape[0])


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def candidates(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    count: int,
    split: bool,
    add: bool = False,
) -> list[bytes]:
    """What the library's heuristic offers, best first; see `lt_candidates` in `blaslt.h`."""
    return _cuda.lt_candidates(
        **_sizes(x, weight, bias, out),
        add=add,
        w=weight.data_ptr(),
        workspace_bytes=WORKSPACE_BYTES,
        count=count,
        split=split,
    )


def rank(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    algorithms: list[bytes],
) -> list[float]:
    """Rough seconds of a product by each algorithm; waits for the device."""
    return _cuda.lt_rank(
        **_sizes(x, weights[0], bias, out),
        add=False,
        weights=[weight.data_ptr() for weight in weights],
        algorithms=algorithms,
        workspace=_workspace(x.device).data_ptr(),
        workspace_bytes=WORKSPACE_BYTES,
        stream=stream_of(x),
    )


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    algorithm: bytes,
    *,
    add: bool = False,
) -> torch.Tensor | None:
    """The product by that algorithm, added to `out` if it says so; None where the algorithm does
    not serve the size.
    """
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    done = _cuda.lt_product(
        **_sizes(x, weight, bias, out),
        add=add,
        w=weight.data_ptr(),
        algorithm=algorithm,
        workspace=_workspace(x.device).data_ptr(),
        workspace_bytes=WORKSPACE_BYTES,
        stream=stream_of(x),
    )
    return out if done else None


def _fixed_algorithm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bytes:
    """The first of the heuristic's algorithms for many rows that takes one row as well."""
    typical = x.new_empty((256, x.shape[1]))
    out = x.new_empty((256, weight.shape[0]))
    for algorithm in candidates(typical, weight, bias, out, count=16, split=False):
        if all(
            run(typical[:rows], weight, bias, out[:rows], algorithm) is not None
            for rows in (1, 16, 256)
        ):
            return algorithm
    raise RuntimeError(
        f"linear: cuBLASLt has no algorithm for weights {tuple(weight.shape)} that takes any "
        "number of rows; --deterministic cannot be kept for this model"
    )


def _sizes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> dict[str, int]:
    n, k = weight.shape
    return {
        "dtype": type_code("linear", x),
        "x": x.data_ptr(),
        "x_stride": x.stride(0),
        "bias": address(bias),
        "out": out.data_ptr(),
        "rows": x.shape[0],
        "n": n,
        "k": k,
    }


def _workspace(device: torch.device) -> torch.Tensor:
    """Where algorithms keep what they need: one stream at a time uses it."""
    made = _workspaces.get(device)
    if made is None:
        made = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        _workspaces[device] = made
    return made
