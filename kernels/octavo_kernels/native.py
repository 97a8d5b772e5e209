"""What the back ends of compiled code share: its numbers for types and functions, addresses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from octavo_kernels.reference import Function

# In the order of types.h.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TYPE_CODES = {dtype: code for code, dtype in enumerate(FLOATS)}
FUNCTIONS: tuple[Function, ...] = ("silu", "gelu", "gelu_tanh", "relu")


class Unserved(NotImplementedError):  # noqa: N818 (an answer, not a failure)
    """A back end has no kernel for these arguments; the text says what is served."""


class Unfused(Unserved):
    """For these arguments the simpler operations are as good; nothing to be said."""


@dataclass(slots=True)
class Profile:
    """What holds for all operations. `deterministic`: a sequence's tokens do not depend on what
    else is in its batch, at some cost in speed. `tuning_folder`: where what was measured on the
    device is kept for the next start, if anywhere.
    """

    deterministic: bool = False
    tuning_folder: Path | None = None


profile = Profile()


def type_code(op: str, tensor: torch.Tensor) -> int:
    """The compiled modules' number of a floating type (types.h `DType`)."""
    code = _TYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"{op}: no kernel for {tensor.dtype}; there are {FLOATS}")
    return code


def stream_of(tensor: torch.Tensor) -> int:
    """The stream that torch works on, on the tensor's GPU: the one that is being captured, where
    one is. By the number alone, as torch's own compiler asks: a Stream object takes microseconds.
    """
    stream: int = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return stream


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's elements begin; 0, a null pointer, where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
