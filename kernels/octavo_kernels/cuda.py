"""Operations on a GPU, by the compiled module `_cuda`; shapes were matched.

What each means is in `reference.py`, under the same name and with the same arguments. Everything
here can be captured in a CUDA graph: no synchronization, no read of what is on the device.
"""

from __future__ import annotations

import octavo_kernels._cuda as _cuda
from octavo_kernels.cuda_batch import apply_updates, build_inputs, record_tokens
from octavo_kernels.cuda_gemm import gated_linear, linear, linear_add

__all__ = [
    "apply_updates", "build_inputs", "device_report", "gated_linear", "linear", "linear_add",
    "record_tokens",
]  # fmt: skip


def device_report(device: int = 0) -> dict[str, int | str]:
    """What `_cuda` sees of the device and its driver; see `csrc/cuda/device.h`."""
    return _cuda.device_report(device)
