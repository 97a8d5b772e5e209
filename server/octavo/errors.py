"""What can go wrong before and around serving, each with a code the operator understands."""

from __future__ import annotations

from enum import IntEnum


class OctavoError(Exception):
    """Base of the errors that a user is meant to read.

    `reason` is a CamelCase word for a Kubernetes condition; `retryable` says whether the same
    start could succeed later without anybody changing anything.
    """

    reason = "InternalError"
    retryable = True


class ModelError(OctavoError):
    """The model folder cannot be served: the text names the file, what is wrong, the next step."""

    reason = "ModelInvalid"
    retryable = False


class UnsupportedModelError(ModelError):
    """The architecture, rope type or quantization is not one of ours; the text names it."""

    reason = "ModelUnsupported"


class DoesNotFitError(OctavoError):
    """The model or its cache does not fit in memory; the text has numbers and what would fit."""

    reason = "ModelDoesNotFit"
    retryable = False


class ConfigError(OctavoError):
    """A flag or environment value is wrong; the text names it and the allowed range."""

    reason = "ConfigInvalid"
    retryable = False


class FetchError(OctavoError):
    """The model could not be fetched from its hub this time; the text says what broke."""

    reason = "ModelFetchFailed"


class FetchRefusedError(FetchError):
    """The hub refuses, has no such model, or offers what we do not take."""

    reason = "ModelFetchRefused"
    retryable = False


class DeviceError(OctavoError):
    """The GPU failed or was lost while in use; the text has the driver's word for it.

    The reason says whom it concerns: KernelFailed, DeviceFailed, DeviceMemoryExhausted or
    DriverUnsuitable.
    """

    def __init__(self, text: str, reason: str = "DeviceFailed") -> None:
        super().__init__(text)
        self.reason = reason


class ExitCode(IntEnum):
    """How a process ended; numbers as in sysexits.h, so that they mean something elsewhere too."""

    OK = 0
    FAILED = 70  # a bug, or the engine process died; starting again may help
    STALLED = 75  # the start made no progress
    CONFIG = 78  # nothing will change until somebody changes the configuration or the model
