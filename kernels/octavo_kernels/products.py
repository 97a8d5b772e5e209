"""Products with a weight matrix, and what decoders do right before and after them.

`weight` is [n, k], as in torch.nn.Linear. On a GPU a product of few rows reads the weight ahead,
while kernels before it still run: nothing in flight on the stream may be writing it. `ahead` is
the weight that the next product reads: where it is small, it is brought to the GPU's cache
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from octavo_kernels.dispatch import implementation, run
from octavo_kernels.match import Arg, checks, match
from octavo_kernels.native import profile
from octavo_kernels.reference import Function, Norm

__all__ = [
    "Norm", "deterministic", "gated_linear", "keep_tuning", "linear", "linear_add", "tune_products",
]  # fmt: skip


def deterministic(on: bool) -> None:
    """From now on, make no result depend on the number of rows it was computed with, or do."""
    profile.deterministic = on


def keep_tuning(folder: Path | None) -> None:
    """From now on keep in that folder what `tune_products` finds, and begin with what is there."""
    profile.tuning_folder = folder


def tune_products(
    weights: Iterable[tuple[torch.Tensor, torch.Tensor | None]], rows: Sequence[int]
) -> int:
    """Find how weights (with their biases) are multiplied fastest with those numbers of rows;
    returns how many sizes were timed. On a GPU it takes milliseconds a size, elsewhere there is
    nothing to find.
    """
    listed = list(weights)
    of_cuda = listed and implementation(listed[0][0].device, listed[0][0].dtype) == "cuda"
    if not of_cuda or profile.deterministic:  # then the rows do not choose
        return 0
    timed: int = run("tune_products", listed[0][0], listed, rows)
    return timed


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    *,
    ahead: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x) · weight^T + bias, [rows, n], in `out` where one is given."""
    if checks.on:
        given = [] if out is None else [Arg("out", out, "rows n")]
        _match("linear", x, weight, bias, norm, *given)
    result: torch.Tensor = run("linear", x, x, weight, bias, norm, ahead, out, composed=_linear)
    return result


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    *,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """function(left half) * right half of norm(x) · weight^T + bias, [rows, n / 2]."""
    if checks.on:
        n = _match("gated_linear", x, weight, bias, norm)["n"]
        if n % 2 != 0:
            raise ValueError(f"gated_linear: weight has {n} rows, which are not two halves")
    args = (x, weight, function, bias, norm, ahead)
    out: torch.Tensor = run("gated_linear", x, *args, composed=_gated_linear)
    return out


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ahead: torch.Tensor | None = None,
) -> None:
    """Add x · weight^T + bias to `residual` [rows, n], in place."""
    if checks.on:
        _match("linear_add", x, weight, bias, None, Arg("residual", residual, "rows n"))
    run("linear_add", x, x, weight, residual, bias, ahead, composed=_linear_add)


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
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    ahead: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if norm is not None:
        return linear(_normed(x, norm), weight, bias, ahead=ahead, out=out)
    if out is None:
        return functional.linear(x, weight, bias)
    torch.mm(x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def _gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    function: Function,
    bias: torch.Tensor | None,
    norm: Norm | None,
    ahead: torch.Tensor | None,
) -> torch.Tensor:
    if norm is not None:
        return gated_linear(_normed(x, norm), weight, function, bias, ahead=ahead)
    out: torch.Tensor = run("act_and_mul", x, linear(x, weight, bias, ahead=ahead), function)
    return out


def _linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    ahead: torch.Tensor | None,
) -> None:
    residual += linear(x, weight, bias, ahead=ahead)


def _normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    out: torch.Tensor = run("rms_norm", x, x.contiguous(), norm.weight, norm.eps, None, norm.offset)
    return out
