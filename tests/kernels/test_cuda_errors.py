"""Errors of CUDA are told apart by whom they concern, however torch or our module words them."""

import re
from pathlib import Path

import pytest

from octavo_kernels.cuda_errors import _KNOWN, CudaFault, cuda_fault


class AcceleratorError(RuntimeError):
    def __init__(self, text: str, error_code: int) -> None:
        super().__init__(text)
        self.error_code = error_code


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("launch: cudaErrorIllegalAddress (an illegal memory …)"), CudaFault.BUG),
        (RuntimeError("launch: cudaErrorECCUncorrectable (…)"), CudaFault.DEVICE),
        (RuntimeError("x: cudaErrorMemoryAllocation (out of memory)"), CudaFault.MEMORY),
        (RuntimeError("x: cudaErrorUnsupportedPtxVersion (…)"), CudaFault.INSTALLATION),
        (AcceleratorError("CUDA error: unspecified launch failure", 719), CudaFault.BUG),
        (AcceleratorError("CUDA error: uncorrectable NVLink error", 220), CudaFault.DEVICE),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\n…"), CudaFault.DEVICE),
        (RuntimeError("CUDA error: device-side assert triggered"), CudaFault.BUG),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), CudaFault.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when …"), CudaFault.BUG),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when …"), CudaFault.MEMORY),
        (ValueError("temperature is cudaless"), None),
        (KeyError("layers.0.qkv"), None),
    ],
    ids=lambda x: str(x)[:40],
)
def test_class(error, fault) -> None:
    assert cuda_fault(error) is fault


def test_numbers_and_names_are_those_of_the_toolkit() -> None:
    torch = pytest.importorskip("torch")
    headers = list(Path(torch.__file__).parents[1].glob("nvidia/cu*/include/driver_types.h"))
    if not headers:
        pytest.skip("no CUDA headers beside torch")
    text = headers[0].read_text()
    real = {int(n): name for name, n in re.findall(r"cudaError(\w+)\s*=\s*(\d+)", text)}
    for rows in _KNOWN.values():
        for number, name, _ in rows:
            assert real[number] == name
