"""GPUs that are too small, too old or broken, as the runner meets them; the GPU is a pretended one.

Everything up to the weights runs as it would, but for the four things that are asked of CUDA.
"""

import logging
from pathlib import Path

import llama_checkpoints
import pytest
import torch

from octavo.engine import runner as runner_module
from octavo.engine.faults import naming_faults
from octavo.engine.model import CheckedModel
from octavo.engine.runner import Runner
from octavo.errors import ConfigError, DeviceError, DoesNotFitError
from octavo_kernels import ops

GIB = 2**30
CUDA = torch.device("cuda")


class AcceleratorError(RuntimeError):
    def __init__(self, text: str, error_code: int) -> None:
        super().__init__(text)
        self.error_code = error_code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(llama_checkpoints.write(tmp_path_factory.mktemp("model")))


class PretendedGpu:
    """`free` bytes of 24 GiB; a report that raises `refused`; weights that fail with `broken`."""

    free = 20 * GIB
    refused: str | None = None
    broken: Exception | None = None
    visible = True

    def report(self) -> dict[str, int | str]:
        if self.refused is not None:
            raise RuntimeError(self.refused)
        return {"name": "NVIDIA L4"}

    def load(self, *_):
        assert self.broken is not None, "nothing may be loaded"
        raise self.broken


@pytest.fixture
def gpu(monkeypatch) -> PretendedGpu:
    pretended = PretendedGpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pretended.visible)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (pretended.free, 24 * GIB))
    monkeypatch.setattr(ops, "device_report", pretended.report)
    monkeypatch.setattr(CheckedModel, "load", pretended.load)
    return pretended


def test_a_gpu_that_is_too_small_is_told_with_numbers(gpu, checkpoint) -> None:
    gpu.free = 1000
    with pytest.raises(
        DoesNotFitError,
        match=r"the weights take 0\.00 GiB as float32, but NVIDIA L4 has 0\.00 of 24\.00 GiB free; "
        "`octavo plan` says where",
    ):
        Runner(checkpoint, device="cuda")


@pytest.mark.parametrize(
    ("broken", "wanted", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nProcess 7 …"),
            DoesNotFitError,
            "NVIDIA L4 has too little memory for the weights, 20.00 of 24.00 GiB are free: set "
            "--max-num-batched-tokens or --max-num-seqs lower, take a larger GPU, or end what "
            "else runs on it (CUDA out of memory. Tried to allocate 2 GiB.)",
        ),
        (
            AcceleratorError("CUDA error: no kernel image is available for execution", 209),
            ConfigError,
            "DriverUnsuitable on NVIDIA L4: CUDA error: no kernel image is available for "
            "execution; driver, CUDA and this build do not fit each other: see nvidia-smi",
        ),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors …"),
            DeviceError,
            "DeviceFailed on NVIDIA L4: CUDA error: uncorrectable ECC error encountered; the GPU "
            "or its link failed: see the driver's log on the node (dmesg, Xid)",
        ),
        (ValueError("config.json is odd"), ValueError, "config.json is odd"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    ],
    ids=lambda x: "",
)
def test_what_breaks_while_starting_says_whom_it_concerns(
    gpu, checkpoint, broken, wanted, text
) -> None:
    gpu.broken = broken
    with pytest.raises(wanted) as caught:
        Runner(checkpoint, device="cuda")
    assert type(caught.value) is wanted
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AcceleratorError("CUDA error: unspecified launch failure", 719), "KernelFailed"),
        (RuntimeError("launch: cudaErrorECCUncorrectable (x)"), "DeviceFailed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "DeviceMemoryExhausted"),
        (RuntimeError("CUDA error: PTX JIT compilation failed"), "DriverUnsuitable"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_breaks_in_flight_may_be_tried_again(error, reason) -> None:
    with pytest.raises(DeviceError, match=rf"{reason} on an H100: .+; .+") as caught:
        with naming_faults(CUDA, "an H100"):
            raise error
    assert caught.value.reason == reason
    assert caught.value.retryable


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_unsuitable_driver_is_for_somebody_to_change(gpu, checkpoint, name) -> None:
    gpu.refused = "the NVIDIA driver supports CUDA 12.2, but this build needs 13.0: install …"
    with pytest.raises(ConfigError, match=rf"--device is {name}, but the NVIDIA driver supports"):
        Runner(checkpoint, device=name)


def test_a_gpu_that_is_not_ready_may_be_later(gpu, checkpoint) -> None:
    gpu.refused = "the GPU or its driver is not ready, cudaGetDeviceCount: cudaErrorSystemNotReady"
    with pytest.raises(DeviceError, match="--device is cuda, but the GPU or its driver is not"):
        Runner(checkpoint, device="cuda")


def test_a_driver_without_a_usable_gpu_is_not_passed_over(
    gpu, checkpoint, monkeypatch, tmp_path, caplog
) -> None:
    """As where torch finds no GPU because the driver is too old."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "device_report", gpu.report)
    gpu.refused = "the NVIDIA driver supports CUDA 12.2, but this build needs 13.0"
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(runner_module, "DRIVER", Path(tmp_path / "absent"))
        assert Runner(checkpoint).device.type == "cpu"
        assert "driver" not in caplog.text
        monkeypatch.setattr(runner_module, "DRIVER", tmp_path)
        assert Runner(checkpoint).device.type == "cpu"
    assert "an NVIDIA driver is loaded, but the CPU is used: the NVIDIA driver" in caplog.text


@pytest.mark.parametrize("error", ["cudaErrorECCUncorrectable", "cudaErrorMemoryAllocation"])
def test_a_cache_that_fails_is_too_large_or_the_gpu_is_lost(checkpoint, monkeypatch, error) -> None:
    def fail(*_):
        raise RuntimeError(f"cudaMalloc: {error} (…)")

    runner = Runner(checkpoint, device="cpu")
    monkeypatch.setattr(runner_module, "_zeros", fail)
    wanted = DoesNotFitError if error == "cudaErrorMemoryAllocation" else DeviceError
    with pytest.raises(wanted):
        runner.allocate_kv(10)
