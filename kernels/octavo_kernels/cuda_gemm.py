"""Matrix products on a GPU: our kernel for the few rows of a small decode step, torch's choice for
more, and for each size that was searched the algorithm of cuBLASLt that was found faster.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

import octavo_kernels._cuda as _cuda
from octavo_kernels import cuda_lt
from octavo_kernels.native import FUNCTIONS, Unfused, address, profile, stream_of, type_code
from octavo_kernels.reference import Function, Norm

# In the order of skinny_gemm.h's Epilogue.
_STORE, _ADD, _GATED = range(3)
_ALIGNMENT = 16  # bytes
# Of a weight that the next product reads: more would push out of the L2 cache what is needed first.
_AHEAD_BYTES = 24 * 2**20
# Bytes of shared memory that a block may take; 0: the kernel's choice. Measurements set it.
shared_limit = 0
# From so many rows on, gates are applied by the product itself, which saves writing and reading the
# halves. Measured on an H100, a layer of llama-8b: 1,377 µs against 1,410 with 2,048 rows, 379
# against 371 with 512.
gated_from = 1024


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    ahead: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    ours = _skinny_serves(x, weight, bias, norm)
    if norm is not None and not ours:
        raise Unfused
    if profile.deterministic:
        return cuda_lt.fixed_product(x, weight, bias, out)
    if not ours:
        result = cuda_lt.product(x, weight, bias, out) if lt_takes(x, weight) else None
        if result is None and out is not None:
            raise Unfused
        return functional.linear(x, weight, bias) if result is None else result
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    skinny_gemm(x, weight, bias, out, norm=norm, ahead=ahead)
    return out


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None,
    norm: Norm | None,
    ahead: torch.Tensor | None,
) -> torch.Tensor:
    many = len(x) >= gated_from and bias is None and norm is None and not profile.deterministic
    many = many and _aligned(x, weight) and _gated_serves(*weight.shape, function, x.device)
    if not many and not _skinny_serves(x, weight, bias, norm):
        raise Unfused
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    if many:
        gated_gemm(x, weight, function, out)
        return out
    skinny_gemm(x, weight, bias, out, norm=norm, epilogue=_GATED, function=function, ahead=ahead)
    return out


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    ahead: torch.Tensor | None,
) -> None:
    if _skinny_serves(x, weight, bias, None):
        skinny_gemm(x, weight, bias, residual, epilogue=_ADD, ahead=ahead)
        return
    many = not takes_few_rows(*x.shape) and not profile.deterministic
    if not (many and lt_takes(x, weight) and cuda_lt.add_product(x, weight, bias, residual)):
        raise Unfused


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    norm: Norm | None = None,
    epilogue: int = _STORE,
    function: Function = "silu",
    ahead: torch.Tensor | None = None,
) -> None:
    """One launch of the kernel, see `skinny_gemm.h`."""
    ahead_bytes = 0
    if ahead is not None and ahead.nbytes <= _AHEAD_BYTES and ahead.data_ptr() % _ALIGNMENT == 0:
        ahead_bytes = ahead.nbytes
    _cuda.skinny_gemm(
        dtype=type_code("skinny_gemm", x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        norm_weight=address(norm.weight) if norm else 0,
        norm_eps=norm.eps if norm else 0.0,
        norm_offset=norm.offset if norm else 0.0,
        w=weight.data_ptr(),
        bias=address(bias),
        out=out.data_ptr(),
        rows=x.shape[0],
        n=weight.shape[0],
        k=x.shape[1],
        epilogue=epilogue,
        function=FUNCTIONS.index(function),
        ahead=address(ahead) if ahead_bytes else 0,
        ahead_bytes=ahead_bytes,
        shared_limit=shared_limit,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def gated_gemm(
    x: torch.Tensor, weight: torch.Tensor, function: Function, out: torch.Tensor
) -> None:
    """One launch of the kernel, see `gated_gemm.h`."""
    _cuda.gated_gemm(
        dtype=type_code("gated_gemm", x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        w=weight.data_ptr(),
        out=out.data_ptr(),
        rows=x.shape[0],
        n=weight.shape[0],
        k=x.shape[1],
        function=FUNCTIONS.index(function),
        stream=stream_of(x),
    )


@functools.cache
def _gated_serves(n: int, k: int, function: Function, device: torch.device) -> bool:
    return _cuda.gated_gemm_serves(n, k, FUNCTIONS.index(function), device.index or 0)


def takes_few_rows(rows: int, k: int) -> bool:
    """Whether so many rows are usually our kernel's."""
    return _cuda.skinny_gemm_serves(rows, k, False)


def usual_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """x · weight^T + bias as it is computed where no search found better."""
    if takes_few_rows(*x.shape) and _aligned(x, weight):
        skinny_gemm(x, weight, bias, out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _skinny_serves(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm | None
) -> bool:
    return (
        not profile.deterministic
        and _cuda.skinny_gemm_serves(x.shape[0], x.shape[1], norm is not None)
        and _aligned(x, weight)
        and cuda_lt.algorithm_of(cuda_lt.size_of(x, weight, bias)) is None
    )


def lt_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """The library was promised aligned rows, of the result too."""
    return _aligned(x, weight) and len(weight) * weight.element_size() % _ALIGNMENT == 0


def _aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    row_bytes = (x.stride(0) | weight.stride(0)) * x.element_size()
    return (x.data_ptr() | weight.data_ptr() | row_bytes) % _ALIGNMENT == 0
