"""The way to a device and back: what is sent before a step, what is fetched after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from octavo.errors import DeviceError

# A step that takes longer never ends: the longest prompts that a step may run take seconds.
STEP_TIMEOUT_S = 120.0
# Looks this often without sleeping: a sleep is at least 50 µs, a short step a few hundred.
_EAGER_LOOKS = 200
_NAP_S = 20e-6


class Fetch(Protocol):
    """Numbers on their way from the device."""

    def wait(self) -> np.ndarray:
        """Wait until they are here; they stay until two more are fetched."""
        ...


class Lane(Protocol):
    """One stream of work. Everything that a step does happens within `scope`."""

    def scope(self) -> AbstractContextManager[Any]:
        """Within it, operations are queued behind each other on this lane."""
        ...

    def send(self, message: np.ndarray) -> torch.Tensor:
        """The int32 numbers on the device, in their shape, until the next are sent."""
        ...

    def fetch(self, numbers: torch.Tensor) -> Fetch:
        """Fetch int32 numbers as they are when what is queued now is done."""
        ...


class HostLane:
    """The lane of the CPU, where work is done when it is asked for."""

    def scope(self) -> AbstractContextManager[Any]:
        """Nothing to set up."""
        return contextlib.nullcontext()

    def send(self, message: np.ndarray) -> torch.Tensor:
        """The message itself."""
        return torch.from_numpy(message)

    def fetch(self, numbers: torch.Tensor) -> Fetch:
        """A copy, now."""
        return _Here(numbers.numpy().copy())


class _Here:
    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers

    def wait(self) -> np.ndarray:
        return self._numbers


class CudaLane:
    """A CUDA stream, pinned buffers for two messages, and a second stream for the way back.

    What is fetched leaves while the next step runs. At most two fetches may be unread, and what a
    fetch reads must not change before it is read.
    """

    def __init__(self, device: torch.device, capacity: int, most_fetched: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)
        self._message = torch.empty(capacity, dtype=torch.int32, device=device)
        self._staging = [torch.empty(capacity, dtype=torch.int32).pin_memory() for _ in range(2)]
        self._staged = [tensor.numpy() for tensor in self._staging]
        self._sent = [torch.cuda.Event() for _ in range(2)]
        self._arrivals = [torch.empty(most_fetched, dtype=torch.int32).pin_memory() for _ in "ab"]
        self._computed = torch.cuda.Event()
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._num_sent = self._num_fetched = 0
        self.lost = False

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Operations go to this lane's stream; no gradients."""
        with torch.cuda.stream(self.stream):
            yield

    def send(self, message: np.ndarray) -> torch.Tensor:
        """Copy by way of a pinned buffer, which is free when its last message has left."""
        slot = self._num_sent % 2
        self._num_sent += 1
        self._sent[slot].synchronize()
        size = message.size
        self._staged[slot][:size] = message.ravel()
        target = self._message[:size]
        target.copy_(self._staging[slot][:size], non_blocking=True)
        self._sent[slot].record(self.stream)
        return target.view(message.shape)

    def fetch(self, numbers: torch.Tensor) -> Fetch:
        """Copy on the second stream, behind what is queued on the first."""
        slot = self._num_fetched % 2
        self._num_fetched += 1
        here = self._arrivals[slot][: len(numbers)]
        # Made for this fetch alone, its memory goes to the next step before the copy has read it.
        numbers.record_stream(self._back)
        self._computed.record(self.stream)
        self._back.wait_event(self._computed)
        with torch.cuda.stream(self._back):
            here.copy_(numbers, non_blocking=True)
        self._arrived[slot].record(self._back)
        return _Arriving(self, self._arrived[slot], here)


class _Arriving:
    def __init__(self, lane: CudaLane, arrived: torch.cuda.Event, numbers: torch.Tensor) -> None:
        self._lane = lane
        self._arrived = arrived
        self._numbers = numbers

    def wait(self) -> np.ndarray:
        looks, deadline = 0, time.monotonic() + STEP_TIMEOUT_S
        while not self._arrived.query():
            looks += 1
            if looks <= _EAGER_LOOKS:
                continue
            # Who waited in vain once does not wait again for what is behind.
            if self._lane.lost or time.monotonic() > deadline:
                self._lane.lost = True
                raise DeviceError(
                    f"DeviceFailed: a step has not ended within {STEP_TIMEOUT_S:.0f} s: the GPU "
                    "hangs or is lost; see the driver's log (dmesg, Xid) and restart the pod"
                )
            time.sleep(_NAP_S)
        numbers: np.ndarray = self._numbers.numpy()
        return numbers
