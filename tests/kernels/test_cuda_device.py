"""Which GPUs and drivers are refused, and in which words; reports as `_cuda` makes them."""

import re
from pathlib import Path

import pytest
from gpu import needs_gpu_module

from octavo_kernels import ops
from octavo_kernels.cuda_device import refusal
from octavo_kernels.cuda_errors import CudaFault, cuda_fault

H100 = {
    "name": "NVIDIA H100 80GB HBM3", "devices": 1, "capability": 90, "multiprocessors": 132,
    "l2_bytes": 50 << 20, "shared_bytes": 232448, "driver_version": 13000,
    "runtime_version": 13020, "binary_version": 90, "architectures": "90a-real;80-virtual",
    "error": "",
}  # fmt: skip
GPUS = Path(__file__).resolve().parents[2] / "docs/gpus.md"
NOTHING = {**H100, "name": "", "devices": 0, "capability": 0, "binary_version": 0}


@pytest.mark.parametrize("changes", [{}, {"driver_version": 14000}, {"capability": 80},
                                     {"capability": 120, "binary_version": 80}])  # fmt: skip
def test_what_is_new_enough_is_taken(changes) -> None:
    assert refusal({**H100, **changes}) is None
    assert refusal({**H100, "devices": 3}, 2) is None


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ({**NOTHING, "driver_version": 0}, "no NVIDIA driver is loaded; CUDA 13.0 needs one of "
         "series 580 or newer"),
        ({**NOTHING, "driver_version": 12080}, "the NVIDIA driver supports CUDA 12.8, but this "
         "build needs 13.0: install driver 580 or newer"),
        (NOTHING, "there is no CUDA device 0, 0 can be seen: ask for one in the pod's resources "
         "(nvidia.com/gpu)"),
        ({**NOTHING, "error": "cudaGetDeviceCount: cudaErrorSystemNotReady"},
         "the GPU or its driver is not ready, cudaGetDeviceCount: cudaErrorSystemNotReady"),
        ({**H100, "name": "Tesla T4", "capability": 75}, "Tesla T4 has compute capability 7.5; at "
         "least 8.0 is needed (A100, A10, L4, H100)"),
        ({**H100, "error": "cudaFuncGetAttributes: cudaErrorNoKernelImageForDevice"},
         "(architectures 90a-real;80-virtual) has no code that the driver takes, "
         "cudaFuncGetAttributes: cudaErrorNoKernelImageForDevice: build again"),
        ({**H100, "error": "cudaFuncGetAttributes: cudaErrorECCUncorrectable"},
         "does not load our kernels, cudaFuncGetAttributes: cudaErrorECCUncorrectable"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_not_says_why_and_what_to_do(report, text) -> None:
    why = refusal(report)
    assert why is not None
    assert text in why
    assert why.endswith("; otherwise use --device cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    assert "no CUDA device 3, 1 can be seen" in str(refusal(H100, 3))


@needs_gpu_module
def test_the_operation_raises_what_was_refused(monkeypatch) -> None:
    from octavo_kernels import _cuda

    monkeypatch.setattr(_cuda, "device_report", lambda device: {**NOTHING, "driver_version": 12020})
    with pytest.raises(RuntimeError, match=re.escape("supports CUDA 12.2, but this build needs")):
        ops.device_report()
    lost = {**NOTHING, "error": "cudaGetDeviceCount: cudaErrorDevicesUnavailable"}
    monkeypatch.setattr(_cuda, "device_report", lambda device: lost)
    with pytest.raises(RuntimeError) as caught:
        ops.device_report()
    assert cuda_fault(caught.value) is CudaFault.DEVICE
    monkeypatch.setattr(_cuda, "device_report", lambda device: H100)
    assert ops.device_report() == H100


@needs_gpu_module
def test_one_lane_or_all_of_a_warp_give_a_stage_back() -> None:
    from octavo_kernels import _cuda

    with pytest.raises(ValueError, match="1 or 32, not 3"):
        _cuda.set_releasing_lanes(3)


def test_the_table_of_gpus_says_which_are_refused() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in GPUS.read_text().splitlines()
        if re.match(r"\| \d+\.\d \|", line)
    ]
    assert len(rows) > 5
    for capability, name, _, state in rows:
        report = {**H100, "name": name, "capability": int(capability.replace(".", ""))}
        assert (refusal(report) is None) == ("refused" not in state), name
    assert [name for _, name, _, state in rows if state.startswith("run")] == ["H100"]
