"""What this GPU can do: bytes copied a second (read and written), bf16 operations a second."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from kernel_timing import Machine


def seconds(work: Callable[[], object], repeat: int = 10) -> float:
    """Mean device time of one call, warmed."""
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeat / 1e3


def measure(elements: int) -> Machine:
    """In this process and now; what is copied are so many bf16 numbers."""
    source = torch.empty(elements, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    rate = 2 * 8192**3 / seconds(lambda: a @ b)
    return Machine(torch.cuda.get_device_name(), copied, rate)


if __name__ == "__main__":
    print(json.dumps(measure(1 << 31).as_json()))
