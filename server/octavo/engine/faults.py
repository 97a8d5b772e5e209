"""Errors of CUDA in the engine's words: what failed, whom it concerns, what to do next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from octavo.errors import ConfigError, DeviceError, DoesNotFitError
from octavo.plan import GIB
from octavo_kernels.cuda_errors import CudaFault, cuda_fault

_NEXT_STEP = {
    CudaFault.BUG: "a kernel or a call of the engine was wrong: please report it with this text",
    CudaFault.DEVICE: "the GPU or its link failed: see the driver's log on the node (dmesg, Xid)",
    CudaFault.MEMORY: "others take memory of this GPU, or set --gpu-memory-utilization lower",
    CudaFault.INSTALLATION: "driver, CUDA and this build do not fit each other: see nvidia-smi",
}


@contextlib.contextmanager
def naming_faults(device: torch.device, name: str, *, starting: str = "") -> Iterator[None]:
    """Within the block errors of CUDA say what they are; afterwards nothing works on that device.

    `starting` says what is being made while the engine starts, when too little memory and a driver
    that does not suit are for somebody to change, rather than to try again.
    """
    try:
        yield
    except RuntimeError as error:
        fault = cuda_fault(error)
        if fault is None:
            raise
        said = str(error).partition("\n")[0]
        if starting and fault is CudaFault.MEMORY:
            raise DoesNotFitError(
                f"{name} has too little memory for {starting}{_memory(device)}: set "
                "--max-num-batched-tokens or --max-num-seqs lower, take a larger GPU, or end what "
                f"else runs on it ({said})"
            ) from error
        text = f"{fault.value} on {name}: {said}; {_NEXT_STEP[fault]}"
        if starting and fault is CudaFault.INSTALLATION:
            raise ConfigError(text) from error
        raise DeviceError(text, fault.value) from error


def _memory(device: torch.device) -> str:
    """What is free, where the device still answers."""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return ""
    return f", {free / GIB:.2f} of {total / GIB:.2f} GiB are free"
