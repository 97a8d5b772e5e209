"""Matrix products on a GPU: our kernel for the rows of a small decode step, torch's for more."""

from __future__ import annotations

import torch
from torch.nn import functional

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import FUNCTIONS, Unfused, address, type_code
from octavo_kernels.reference import Function, Norm

# In the order of skinny_gemm.h's Epilogue.
_STORE, _ADD, _GATED = range(3)
_ALIGNMENT = 16  # bytes


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm | None
) -> torch.Tensor:
    if not _skinny_serves(x, weight, norm):
        if norm is not None:
            raise Unfused
        return functional.linear(x, weight, bias)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    skinny_gemm(x, weight, bias, out, norm=norm)
    return out


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None,
    norm: Norm | None,
) -> torch.Tensor:
    if not _skinny_serves(x, weight, norm):
        raise Unfused
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    skinny_gemm(x, weight, bias, out, norm=norm, epilogue=_GATED, function=function)
    return out


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if not _skinny_serves(x, weight, None):
        raise Unfused
    skinny_gemm(x, weight, bias, residual, epilogue=_ADD)


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    norm: Norm | None = None,
    epilogue: int = _STORE,
    function: Function = "silu",
    shared_limit: int = 0,
) -> None:
    """One launch of the kernel; `shared_limit` is for measurements, see `skinny_gemm.h`."""
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
        shared_limit=shared_limit,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def _skinny_serves(x: torch.Tensor, weight: torch.Tensor, norm: Norm | None) -> bool:
    aligned = (
        x.data_ptr() % _ALIGNMENT == 0
        and weight.data_ptr() % _ALIGNMENT == 0
        and x.stride(0) * x.element_size() % _ALIGNMENT == 0
    )
    return aligned and _cuda.skinny_gemm_serves(x.shape[0], x.shape[1], norm is not None)
