"""Whether our kernels run on a GPU with its driver, and what to do where they do not.

Imports neither torch nor the compiled module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

# As `csrc/cuda/device.h` says.
DeviceReport: TypeAlias = dict[str, int | str]

LEAST_CAPABILITY = 80  # bfloat16 on tensor cores, cp.async
# By CUDA's major version, the first series of drivers that supports it.
_SERIES = {12: 525, 13: 580}
_NO_CODE = (
    "cudaErrorNoKernelImageForDevice",
    "cudaErrorUnsupportedPtxVersion",
    "cudaErrorInvalidPtx",
)


def refusal(report: Mapping[str, int | str], device: int = 0) -> str | None:
    """Why not, with the numbers and the next step, in a sentence for the user; None where they do.

    Within one major version of CUDA an older driver runs what a newer runtime asks for.
    """
    driver, runtime = int(report["driver_version"]), int(report["runtime_version"])
    error, devices = str(report["error"]), int(report["devices"])
    capability, named = int(report["capability"]), report["name"]
    series = f"{_SERIES.get(runtime // 1000, 580)} or newer"
    if driver == 0 and not error:
        why = f"no NVIDIA driver is loaded; CUDA {runtime // 1000}.0 needs one of series {series}"
    elif driver // 1000 < runtime // 1000 and not error:
        why = (
            f"the NVIDIA driver supports CUDA {_version(driver)}, but this build needs "
            f"{runtime // 1000}.0: install driver {series}"
        )
    elif error and not capability:
        why = f"the GPU or its driver is not ready, {error}: see nvidia-smi and dmesg on the node"
    elif not 0 <= device < devices:
        why = (
            f"there is no CUDA device {device}, {devices} can be seen: ask for one in the pod's "
            "resources (nvidia.com/gpu)"
        )
    elif capability < LEAST_CAPABILITY:
        why = (
            f"{named} has compute capability {_dotted(capability)}; at least "
            f"{_dotted(LEAST_CAPABILITY)} is needed (A100, A10, L4, H100)"
        )
    elif error.endswith(_NO_CODE):
        why = (
            f"{named} has compute capability {_dotted(capability)}, for which this build "
            f"(architectures {report['architectures']}) has no code that the driver takes, "
            f"{error}: build again with CMAKE_CUDA_ARCHITECTURES set to it, or install a newer "
            "driver"
        )
    elif error:
        why = f"{named} does not load our kernels, {error}: see nvidia-smi and dmesg on the node"
    else:
        return None
    return why + "; otherwise use --device cpu"


def _dotted(tenths: int) -> str:
    return f"{tenths // 10}.{tenths % 10}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
