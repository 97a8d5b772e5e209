"""Which back end runs an operation: a module of functions named as the operations are.

Tensors in host memory go to "cpu" (`_core`, C++), half-precision and integer tensors on a GPU to
"cuda" (`_cuda`), all others to "reference" (torch). An operation that a back end lacks runs as the
reference too, and so do arguments that its kernel does not serve (`Unserved`), which one log
line says. `calls` counts what ran, so that a test can tell.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

import torch

from octavo_kernels.native import Unfused, Unserved

BackEnd = Literal["cpu", "cuda", "reference"]
# "composed": a fused operation that ran as the simpler ones that it is made of.
Ran = Literal["cpu", "cuda", "reference", "composed"]

logger = logging.getLogger(__name__)

_BUILD_IT = "Build it with: pip install --no-build-isolation -e ."

calls: Counter[tuple[str, Ran]] = Counter()
_SERVED_ON_GPU = (torch.bfloat16, torch.float16, torch.int32, torch.int64)
_forced: BackEnd | None = None
_said: set[str] = set()
# What was chosen before, by device, type and what was forced.
_chosen: dict[tuple[torch.device, torch.dtype, BackEnd | None], BackEnd] = {}


def _load(name: BackEnd) -> ModuleType | None:
    """The back end, or None without its compiled module: absent is a choice, broken an error."""
    try:
        return importlib.import_module(f"octavo_kernels.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("octavo_kernels._"):
            return None
        raise


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)


_NAMES: tuple[BackEnd, ...] = ("cpu", "cuda", "reference")
_back_ends = {name: module for name in _NAMES if (module := _load(name)) is not None}
if "cpu" not in _back_ends:
    _say_once(
        "octavo_kernels._core is not built: operations run on torch, several times slower. "
        + _BUILD_IT
    )


def implementations(device: str | torch.device = "cpu") -> tuple[BackEnd, ...]:
    """What this installation has for tensors on such a device."""
    kind = torch.device(device).type
    return tuple(name for name in _back_ends if name in (kind, "reference"))


def implementation(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> BackEnd:
    """Which back end tensors of this type on this device are given to."""
    kind = torch.device(device).type
    if _forced is not None:
        if _forced not in (kind, "reference"):
            raise ValueError(f"implementation {_forced!r} is forced, but a tensor is on {device}")
        return _forced
    if kind == "cpu" and "cpu" in _back_ends:
        return "cpu"
    if kind == "cuda" and "cuda" not in _back_ends:
        _say_once(
            "octavo_kernels._cuda is not built: operations on the GPU run on torch, several times "
            "slower, and not in CUDA graphs. It needs nvcc 13. " + _BUILD_IT
        )
    elif kind == "cuda" and dtype in _SERVED_ON_GPU:
        return "cuda"
    return "reference"


@contextlib.contextmanager
def forced(name: BackEnd) -> Iterator[None]:
    """Within the block every operation uses the named back end; what its kernels do not serve
    is an error (tests, measurements).
    """
    global _forced
    if name not in _back_ends:
        raise ValueError(f"implementation {name!r} is not here; built are {tuple(_back_ends)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def device_report() -> dict[str, int | str]:
    """What `_cuda` knows of the GPU in use and its driver; nothing where it was not built.

    Raises RuntimeError in a sentence for the user where our kernels do not run on them.
    """
    if "cuda" not in _back_ends:
        return {}
    report: dict[str, int | str] = _back_ends["cuda"].device_report()
    return report


def instruction_sets() -> tuple[str, ...]:
    """What "cpu" can use on this host, best first; the first is used."""
    return _back_ends["cpu"].instruction_sets() if "cpu" in _back_ends else ()


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Within the block "cpu" uses the named instruction set (tests, measurements)."""
    if "cpu" not in _back_ends:
        raise ValueError("octavo_kernels._core is not built")
    with _back_ends["cpu"].forced_instruction_set(name):
        yield


def run(op: str, like: torch.Tensor, *args: Any, composed: Callable[..., Any] | None = None) -> Any:
    """Call the operation in the back end of the tensor `like`, or in the reference.

    `composed` is a fused operation said in terms of simpler ones: the meaning, instead of a
    function in `reference`, and what runs where there is no fused kernel.
    """
    looks = (like.device, like.dtype, _forced)
    chosen = _chosen.get(looks)
    if chosen is None:
        chosen = _chosen[looks] = implementation(like.device, like.dtype)
    function = getattr(_back_ends[chosen], op, None)
    if function is not None:
        try:
            result = function(*args)
        except Unfused:
            pass
        except Unserved as why:
            if _forced is not None:
                raise
            _say_once(f"{op} runs on torch instead of {chosen!r}, several times slower: {why}")
        else:
            calls[op, chosen] += 1
            return result
    if composed is not None:
        calls[op, "composed"] += 1
        return composed(*args)
    calls[op, "reference"] += 1
    return getattr(_back_ends["reference"], op)(*args)
