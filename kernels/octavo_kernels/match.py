"""Match the tensors of a call against named dimensions, so that errors name the argument."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

# A step makes the same calls in every layer: what was matched once is not looked at again.
_matched: dict[tuple[object, ...], dict[str, int]] = {}
_MOST_REMEMBERED = 4096


@dataclass(slots=True)
class Checks:
    """Whether operations look at their arguments before they run."""

    on: bool = True


checks = Checks()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Within the block operations trust the caller, who has made such calls before: of a layer's
    time on the host, checks take as much as the launches.
    """
    before, checks.on = checks.on, False
    try:
        yield
    finally:
        checks.on = before


class Arg(NamedTuple):
    """What one tensor argument must look like.

    `shape` names the dimensions ("tokens heads dim"); equal names are equal sizes across the
    call. `dtype` is a torch dtype, or a name that binds to the first tensor carrying it.
    `rows` allows any stride between rows as long as each row is dense (a column slice of a fused
    projection); otherwise the tensor must be contiguous. `on_host`: in host memory, wherever the
    others are.
    """

    name: str
    tensor: torch.Tensor
    shape: str
    dtype: torch.dtype | str = "T"
    rows: bool = False
    on_host: bool = False


def match(op: str, *args: Arg) -> dict[str, int]:
    """Return the size of every named dimension; raise naming the first argument that differs.

    Do not change what it returns: a call with tensors of the same looks gets it again.
    """
    looks: tuple[object, ...] = (
        op,
        *[
            (a.name, a.shape, t.shape, t.stride(), t.dtype, t.device)
            for a in args
            for t in (a.tensor,)
        ],
    )
    sizes = _matched.get(looks)
    if sizes is None:
        sizes = _match(op, args)
        if len(_matched) == _MOST_REMEMBERED:
            _matched.clear()
        _matched[looks] = sizes
    return sizes


def _match(op: str, args: tuple[Arg, ...]) -> dict[str, int]:
    sizes: dict[str, tuple[int, str]] = {}
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    device = args[0].tensor.device
    for arg in args:
        where = f"{op}: {arg.name}"
        _match_shape(where, arg, sizes)
        _match_dtype(where, arg, dtypes)
        wanted = torch.device("cpu") if arg.on_host else device
        if arg.tensor.device != wanted:
            raise ValueError(f"{where} is on {arg.tensor.device}, but must be on {wanted}")
        dense = _rows_are_dense(arg.tensor) if arg.rows else arg.tensor.is_contiguous()
        if not dense:
            kind = "have dense rows" if arg.rows else "be contiguous"
            raise ValueError(f"{where} must {kind}, got strides {tuple(arg.tensor.stride())}")
    return {name: size for name, (size, _) in sizes.items()}


def _match_shape(where: str, arg: Arg, sizes: dict[str, tuple[int, str]]) -> None:
    names = arg.shape.split()
    shape = tuple(arg.tensor.shape)
    if len(names) != len(shape):
        raise ValueError(f"{where} must have dimensions [{', '.join(names)}], got shape {shape}")
    for name, size in zip(names, shape, strict=True):
        known = sizes.setdefault(name, (size, arg.name))
        if known[0] != size:
            raise ValueError(
                f"{where} has {name}={size} in shape {shape}, but {known[1]} has {name}={known[0]}"
            )


def _match_dtype(where: str, arg: Arg, dtypes: dict[str, tuple[torch.dtype, str]]) -> None:
    got = arg.tensor.dtype
    if isinstance(arg.dtype, torch.dtype):
        if got != arg.dtype:
            raise TypeError(f"{where} must be {arg.dtype}, got {got}")
        return
    known = dtypes.setdefault(arg.dtype, (got, arg.name))
    if known[0] != got:
        raise TypeError(f"{where} is {got}, but {known[1]} is {known[0]}")


def _rows_are_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.shape[0] <= 1 or tensor.stride(0) >= expected
