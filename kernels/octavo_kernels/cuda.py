"""Operations on a GPU, by the compiled module `_cuda`; shapes were matched.

What each means is in `reference.py`, under the same name and with the same arguments. Everything
here can be captured in a CUDA graph: no synchronization, no read of what is on the device.
"""

from __future__ import annotations

import octavo_kernels._cuda as _cuda


def device_report(device: int = 0) -> dict[str, int | str]:
    """What `_cuda` sees of the device and its driver; see `csrc/cuda/device.h`."""
    return _cuda.device_report(device)
