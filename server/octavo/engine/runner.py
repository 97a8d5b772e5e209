"""Step plan → tokens: owns the device, the weights and the KV cache, and decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from octavo import plan as memory_plan
from octavo.config import cache_folder, token_budget
from octavo.core.step import StepPlan, StepResult
from octavo.engine.ahead import Ahead
from octavo.engine.eager import EagerSteps
from octavo.engine.faults import naming_faults
from octavo.engine.gpu import Gpu
from octavo.engine.memory import available_host_bytes
from octavo.engine.model import CheckedModel, Model, check_model
from octavo.engine.swap import HostBlocks, host_bytes
from octavo.errors import ConfigError, DeviceError, DoesNotFitError
from octavo.models.decoder import Decoder
from octavo.models.hf_config import read_eos_token_ids
from octavo.models.spec import DecoderSpec
from octavo_kernels import ops
from octavo_kernels.cuda_errors import CudaFault, cuda_fault

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Report = Callable[[str, float], None]
DRIVER = Path("/proc/driver/nvidia")


def _silent(_phase: str, _ratio: float) -> None:
    pass


class Step(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Wait for the step's end; what it brought."""
        ...


class Steps(Protocol):
    """How steps are run on a device. `host_blocks` are what plans swap with."""

    host_blocks: HostBlocks | None

    def submit(self, plan: StepPlan) -> Step:
        """Start a step; its tokens need not be known yet when this returns."""
        ...

    def prepare_one(self) -> bool:
        """Prepare for one kind of step to come, False when nothing is left to prepare."""
        ...


class Runner:
    """A model on a device. Build it, `allocate_kv`, then `submit` one plan after another.

    At most two steps may be in flight, and are collected in order. A plan that is submitted while
    the one before is in flight has `PENDING` where a token of that one is to stand. Where
    `needs_host(params)` holds for a sequence in flight, nothing may be submitted after it.

    `device` and `dtype` may be "auto": the GPU if there is one, and the checkpoint's type on a
    GPU or float32 on a CPU. `progress(phase, ratio)` is called while starting. `num_threads`
    bounds the CPU threads of torch and of our kernels for the whole process. `max_num_seqs` and
    `max_num_batched_tokens` bound a step on a GPU, `enforce_eager` runs it without CUDA graphs.
    With `deterministic`, tokens on a GPU too are independent of the rest of the batch. `ahead` is
    the same model, checked, with its weights on their way to the GPU.
    """

    def __init__(  # noqa: PLR0913 (each is a setting of its own)
        self,
        model_path: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        progress: Report = _silent,
        num_threads: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        hf_overrides: Mapping[str, Any] | None = None,
        load_format: str = "auto",
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enforce_eager: bool = False,
        deterministic: bool = False,
        ahead: Ahead | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        folder = Path(model_path)
        progress("check", 0.0)
        model = (
            ahead.model
            if ahead is not None
            else check_model(
                folder,
                trust_remote_code=trust_remote_code,
                hf_overrides=hf_overrides,
                random_seed=seed if load_format == "dummy" else None,
            )
        )
        self.spec: DecoderSpec = model.spec
        self.eos_token_ids = read_eos_token_ids(folder, model.config, self.spec.vocab_size)
        self.device, self._device_name = _device(device)
        self.dtype_name = _dtype_name(dtype, self.device, self.spec)
        self.max_model_len = _max_model_len(max_model_len, self.spec)
        self.block_size = block_size
        self._layout = self.spec.kv_layout(self.max_model_len)
        self._seed = seed
        progress("check", 1.0)

        self._progress = progress
        with self._naming_faults("the weights"):
            self._decoder = self._load(model, ahead)
        self._planned_bytes: int | None = None  # for the weights, where headers tell it
        if isinstance(self._decoder, Decoder) and load_format != "dummy":
            tied = self.spec.tied_embeddings
            self._planned_bytes = memory_plan.weights_bytes(folder, self.dtype_name, tied=tied)
        self._kv_cache: torch.Tensor | None = None
        self._steps: Steps | None = None
        self._gpu: Gpu | None = None
        if self.device.type == "cuda" and isinstance(self._decoder, Decoder):
            progress("device", 0.0)
            ops.deterministic(deterministic)
            ops.keep_tuning(cache_folder())
            with self._naming_faults("what a step needs beside the weights"):
                self._gpu = Gpu(
                    self._decoder,
                    device=self.device,
                    block_size=block_size,
                    max_model_len=self.max_model_len,
                    max_num_seqs=max_num_seqs,
                    max_num_tokens=self._large_step(max_num_batched_tokens),
                    eager=enforce_eager,
                    deterministic=deterministic,
                )
            progress("device", 1.0)

    @property
    def large_step(self) -> int | None:
        """Tokens of the largest step; None on a CPU, where larger ones are no faster."""
        return self._gpu.max_num_tokens if self._gpu else None

    def _large_step(self, asked: int | None) -> int:
        """Tokens of the largest step there is room for."""
        spec = self.spec
        each = memory_plan.token_bytes(
            hidden_size=spec.hidden_size,
            query_size=spec.query_size,
            kv_size=spec.kv_size,
            intermediate_size=spec.intermediate_size,
            dtype=self.dtype_name,
        )
        _, total = torch.cuda.mem_get_info(self.device)
        usual = token_budget(asked, self.device.type)
        return memory_plan.large_step(usual, each, total, self.kv_windows)

    def _load(self, model: CheckedModel, ahead: Ahead | None) -> Model:
        """The model with its weights: those that were on their way, else they are read now."""

        def progress(done: int, total: int) -> None:
            self._progress("weights", done / max(1, total))

        progress(0, 1)
        brought = ahead and ahead.finish(self.device, self.dtype_name, progress)
        if not brought:
            self._require_memory(model.num_parameters * memory_plan.DTYPE_BYTES[self.dtype_name])
        dtype = _DTYPES[self.dtype_name]
        return model.load(dtype, self.device, self.max_model_len, progress, brought or None)

    @property
    def vocab_size(self) -> int:
        """Token ids are 0..vocab_size-1."""
        return self.spec.vocab_size

    @property
    def implementation(self) -> str:
        """Which kernels run on this device."""
        return ops.implementation(self.device)

    @property
    def kv_shape(self) -> memory_plan.KvShape:
        """What the memory plan needs to know of a group of layers."""
        spec = self.spec
        return memory_plan.KvShape(
            self._layout.layers_per_group, spec.num_kv_heads, spec.head_dim, self.dtype_name
        )

    @property
    def kv_windows(self) -> tuple[int | None, ...]:
        """The windows of the groups of layers; None for one that keeps everything."""
        return self._layout.windows

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one KV block across the layers of a group."""
        return memory_plan.kv_bytes_per_block(self.kv_shape, self.block_size)

    def free_memory_for_kv(self, gpu_memory_utilization: float) -> int:
        """Bytes that the KV pool may take, with the weights loaded."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            free -= self._gpu.reserved_bytes if self._gpu else 0
            return memory_plan.device_pool_bytes(total, free, gpu_memory_utilization)
        return memory_plan.host_pool_bytes(available_host_bytes(), gpu_memory_utilization)

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pool. Host memory is taken as blocks are first written."""
        spec = self.spec
        self._progress("cache", 0.0)
        shape = (
            self._layout.layers_per_group, 2, num_blocks, self.block_size, spec.num_kv_heads,
            spec.head_dim,
        )  # fmt: skip
        try:
            kv_cache = _zeros(shape, _DTYPES[self.dtype_name], self.device)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and cuda_fault(error) is not CudaFault.MEMORY:
                with self._naming_faults("the KV cache"):
                    raise
            size = num_blocks * self.kv_bytes_per_block / memory_plan.GIB
            raise DoesNotFitError(
                f"a KV pool of {num_blocks} blocks ({size:.2f} GiB) cannot be allocated on "
                f"{self.device}; set --num-kv-blocks lower"
            ) from error
        self._kv_cache = kv_cache
        self._compare_with_plan(num_blocks)
        if self._gpu is not None:
            with self._naming_faults("the first step"):
                self._steps = self._gpu.steps(kv_cache, self.eos_token_ids, self._seed)
        else:
            self._steps = EagerSteps(
                self._decoder, kv_cache, len(self.kv_windows), self.eos_token_ids, self._seed
            )
        self._progress("cache", 1.0)

    def _compare_with_plan(self, num_blocks: int) -> None:
        """Log an error where the memory plan, on which users size their pods, is wrong."""
        model = self._decoder
        if self._planned_bytes is None or self._kv_cache is None or not isinstance(model, Decoder):
            return
        weights = sum(tensor.nbytes for tensor in model.parameters.values())
        planned = self._planned_bytes + num_blocks * self.kv_bytes_per_block
        problem = memory_plan.deviation(planned, weights + self._kv_cache.nbytes)
        if problem is not None:
            logger.error("%s", problem)

    def allocate_swap(self, num_blocks: int) -> float:
        """Make room for so many blocks in host memory; return the seconds that copying one takes.

        After `allocate_kv`. On a CPU memory is taken as blocks are first written, on a GPU at once.
        """
        if self._kv_cache is None or self._steps is None:
            raise RuntimeError("allocate_kv comes before allocate_swap")
        needed = host_bytes(num_blocks * self.kv_bytes_per_block, self.device)
        free = available_host_bytes()
        try:
            if needed > free:
                raise MemoryError
            self._steps.host_blocks = HostBlocks(self._kv_cache, num_blocks)
        except (RuntimeError, MemoryError) as error:
            raise DoesNotFitError(
                f"--swap-space takes {needed / memory_plan.GIB:.2f} GiB of host memory and "
                f"{free / memory_plan.GIB:.2f} GiB are free; set it lower, or give the pod more"
            ) from error
        return self._steps.host_blocks.seconds_per_block()

    def submit(self, plan: StepPlan) -> Step:
        """Start a step and return at once, as far as the device allows."""
        if self._steps is None:
            raise RuntimeError("allocate_kv comes before submit")
        with self._naming_faults():
            return self._steps.submit(plan)

    def collect(self, step: Step) -> StepResult:
        """Wait for a step's end and return what it brought.

        A token of -1 (`step.NO_TOKEN`) says that the sequence's logits were NaN.
        """
        with self._naming_faults():
            return step.result()

    def prepare_one(self) -> bool:
        """Use an idle moment for a step to come; False when there is nothing left to prepare."""
        with self._naming_faults():
            return self._steps is not None and self._steps.prepare_one()

    def _naming_faults(self, starting: str = "") -> AbstractContextManager[None]:
        return naming_faults(self.device, self._device_name, starting=starting)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step from start to end."""
        return self.collect(self.submit(plan))

    def _require_memory(self, needed: int) -> None:
        if self.device.type == "cuda":
            available, total = torch.cuda.mem_get_info(self.device)
            has = f"{available / memory_plan.GIB:.2f} of {total / memory_plan.GIB:.2f} GiB free"
        else:
            available = available_host_bytes()
            has = f"{available / memory_plan.GIB:.2f} GiB available"
        if needed > available:
            raise DoesNotFitError(
                f"the weights take {needed / memory_plan.GIB:.2f} GiB as {self.dtype_name}, but "
                f"{self._device_name} has {has}; `octavo plan` says where the model would fit"
            )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU untouched pages, which take no memory and no time until written.

    torch.zeros writes every byte of host memory, numpy asks the kernel for pages that are zero.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


def _device(name: str) -> tuple[torch.device, str]:
    """Where to run, and what it is called."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, not {name!r}")
    has_gpu = torch.cuda.is_available()
    if name == "cpu":
        return torch.device("cpu"), "cpu"
    if name == "auto" and not has_gpu:
        _say_whose_gpu_is_not_used()
        return torch.device("cpu"), "cpu"
    try:
        ops.device_report()
    except RuntimeError as error:
        text = f"--device is {name}, but {error}"
        if cuda_fault(error) is CudaFault.DEVICE:
            raise DeviceError(text) from error
        raise ConfigError(text) from error
    if not has_gpu:
        raise ConfigError("--device is cuda, but no CUDA device is visible; use --device cpu")
    device = torch.device("cuda")
    with naming_faults(device, "the GPU", starting="anything"):
        return device, torch.cuda.get_device_name(device)


def _say_whose_gpu_is_not_used() -> None:
    """A node with a driver was meant to have a GPU: say why the CPU is used all the same."""
    if not DRIVER.exists():
        return
    try:
        ops.device_report()
    except RuntimeError as error:
        logger.warning("an NVIDIA driver is loaded, but the CPU is used: %s", error)


def _dtype_name(name: str, device: torch.device, spec: DecoderSpec) -> str:
    if name == "auto":
        return "float32" if device.type == "cpu" else spec.checkpoint_dtype
    if name not in _DTYPES:
        raise ConfigError(f"--dtype must be auto or one of {', '.join(_DTYPES)}, not {name!r}")
    return name


def _max_model_len(wanted: int | None, spec: DecoderSpec) -> int:
    if wanted is None:
        return spec.max_positions
    if not 1 <= wanted <= spec.max_positions:
        raise ConfigError(
            f"--max-model-len is {wanted}, but this model's positions allow 1..{spec.max_positions}"
        )
    return wanted
