"""What an error of CUDA says about where to look: at our code, the GPU, its memory, the driver.

After most of them the process's CUDA context is lost: nothing in it works again, and the process
has to end. Imports neither torch nor the compiled module.
"""

from __future__ import annotations

import re
from enum import Enum


class CudaFault(Enum):
    """Who has to do something; the value is a CamelCase reason."""

    BUG = "KernelFailed"  # a kernel or a call was wrong; starting again may help for a while
    DEVICE = "DeviceFailed"  # the GPU or its links; another GPU helps, the same one rarely
    MEMORY = "DeviceMemoryExhausted"
    INSTALLATION = "DriverUnsuitable"  # driver, runtime and build do not fit each other


# Of the runtime API's cudaError: number, name without "cudaError", what torch prints of it. All
# others are BUG.
_KNOWN = {
    CudaFault.MEMORY: ((2, "MemoryAllocation", "out of memory"),),
    CudaFault.DEVICE: (
        (46, "DevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"),
        (100, "NoDevice", "no CUDA-capable device is detected"),
        (214, "ECCUncorrectable", "uncorrectable ECC error encountered"),
        (220, "NvlinkUncorrectable", "uncorrectable NVLink error"),
        (714, "HardwareStackError", "hardware stack error"),
        (802, "SystemNotReady", "system not yet initialized"),
        (911, "ExternalDevice", "async operations failed"),
        (999, "Unknown", "unknown error"),
    ),
    CudaFault.INSTALLATION: (
        (35, "InsufficientDriver", "driver version is insufficient"),
        (127, "StartupFailure", "API call failed during startup"),
        (209, "NoKernelImageForDevice", "no kernel image is available"),
        (218, "InvalidPtx", "PTX JIT compilation failed"),
        (221, "JitCompilerNotFound", "PTX JIT compiler library not found"),
        (222, "UnsupportedPtxVersion", "compiled with an unsupported toolchain"),
        (803, "SystemDriverMismatch", "unsupported display driver / cuda driver combination"),
        (804, "CompatNotSupportedOnDevice", "forward compatibility was attempted"),
    ),
}
_BY_NUMBER = {number: fault for fault, rows in _KNOWN.items() for number, _, _ in rows}
_BY_NAME = {name: fault for fault, rows in _KNOWN.items() for _, name, _ in rows}
_BY_PHRASE = {phrase: fault for fault, rows in _KNOWN.items() for _, _, phrase in rows}
_NAME = re.compile(r"\bcudaError(\w+)")


def cuda_fault(error: BaseException) -> CudaFault | None:
    """The class of an error that our kernels or torch raised, None where it is not CUDA's.

    torch's errors carry the number (`error_code`), ours and most of torch's texts the name.
    """
    number = getattr(error, "error_code", None)
    if isinstance(number, int) and number:
        return _BY_NUMBER.get(number, CudaFault.BUG)
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return CudaFault.MEMORY
    if name := _NAME.search(text):
        return _BY_NAME.get(name[1], CudaFault.BUG)
    if "CUDA error" not in text and "CUDA driver" not in text and "CUBLAS_STATUS" not in text:
        return None
    return next((f for phrase, f in _BY_PHRASE.items() if phrase in text), CudaFault.BUG)
