"""Products with a weight matrix, and what decoders do right before and after them.

`weight` is [n, k], as in torch.nn.Linear. On a GPU a product of few rows reads the weight ahead,
while kernels before it still run: nothing in flight on the stream may be writing it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, match
from octavo_kernels.reference import Function, Norm

__all__ = ["Norm", "gated_linear", "linear", "linear_add"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> torch.Tensor:
    """norm(x) · weight^T + bias, [rows, n]."""
    _match("linear", x, weight, bias, norm)
    out: torch.Tensor = run("linear", x, x, weight, bias, norm, composed=_linear)
    return out


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> torch.Tensor:
    """function(left half) * right half of norm(x) · weight^T + bias, [rows, n / 2]."""
    size = _match("gated_linear", x, weight, bias, norm)
    if size["n"] % 2 != 0:
        raise ValueError(f"gated_linear: weight has {size['n']} rows, which are not two halves")
    args = (x, weight, function, bias, norm)
    out: torch.Tensor = run("gated_linear", x, *args, composed=_gated_linear)
    return out


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Add x · weight^T + bias to `residual` [rows, n], in place."""
    _match("linear_add", x, weight, bias, None, Arg("residual", residual, "rows n"))
    run("linear_add", x, x, weight, residual, bias, composed=_linear_add)


def _match(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    *more: Arg,
) -> dict[str, int]:
    args = [Arg("x", x, "rows k", rows=True), Arg("weight", weight, "n k"), *more]
    if bias is not None:
        args.append(Arg("bias", bias, "n"))
    if norm is not None:
        args.append(Arg("norm.weight", norm.weight, "k"))
    return match(op, *args)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm | None
) -> torch.Tensor:
    if norm is None:
        return functional.linear(x, weight, bias)
    args = (x.contiguous(), norm.weight, norm.eps, None, norm.offset)
    return linear(run("rms_norm", x, *args), weight, bias)


def _gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None,
    norm: Norm | None,
) -> torch.Tensor:
    out: torch.Tensor = run("act_and_mul", x, linear(x, weight, bias, norm), function)
    return out


def _linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> None:
    residual += linear(x, weight, bias)
