"""From a configuration to an engine that has drawn a real token: the start, phase by phase."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from octavo import wire
from octavo.config import EngineConfig, token_budget
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.step import StepPlan, StepResult
from octavo.core.swap import SwapSpace
from octavo.engine.ahead import begin
from octavo.engine.locate import locate
from octavo.engine.loop import EngineLoop, RunnerError
from octavo.engine.memory import available_host_bytes
from octavo.errors import ConfigError, DoesNotFitError
from octavo.params import SamplingParams

RUNNER = "octavo.engine.runner:Runner"
# Where the host computes, there is nothing to hide behind the device.
PIPELINE_DEPTH = {"cuda": 2}
_MIB = 2**20

logger = logging.getLogger(__name__)


class ModelRunner(Protocol):
    """What the engine needs of a loaded model.

    `kv_bytes_per_block` counts the layers of a group, and `kv_windows` are the groups' windows.
    `large_step` is how many tokens a step may have that nobody's next token waits for; None where
    larger steps are no faster.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_bytes_per_block: int
    kv_windows: tuple[int | None, ...]
    large_step: int | None
    device: object
    dtype_name: str

    def free_memory_for_kv(self, gpu_memory_utilization: float) -> int:
        """Bytes that the KV cache may take when that share of the device's memory is ours."""
        ...

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the cache; `num_blocks` includes the null block 0."""
        ...

    def allocate_swap(self, num_blocks: int) -> float:
        """Make room for so many blocks in host memory; return the seconds to copy one.

        `num_blocks` includes the null block 0.
        """
        ...

    def submit(self, plan: StepPlan) -> Any:
        """Start one step."""
        ...

    def prepare_one(self) -> bool:
        """Prepare for one kind of step to come, in an idle moment; False when none is left."""
        ...

    def collect(self, step: Any) -> StepResult:
        """Wait for its end."""
        ...


class Reporter:
    """Sends progress, at most every `interval` seconds within a phase, with an estimate to go."""

    def __init__(
        self,
        send: Callable[[wire.ToApi], None],
        clock: Callable[[], float] = time.monotonic,
        interval: float = 0.1,
    ) -> None:
        self._send = send
        self._clock = clock
        self._interval = interval
        self._phase = ""
        self._begin = self._last = 0.0
        self._seconds: dict[str, float] = {}

    def __call__(self, phase: str, ratio: float, eta_s: float | None = None) -> None:
        """Report that `phase` is done to `ratio`."""
        now = self._clock()
        if phase != self._phase:
            self._end_phase(now)
            self._phase = phase
        elif ratio < 1 and now - self._last < self._interval:
            return
        self._last = now
        if eta_s is None and 0 < ratio < 1:
            eta_s = (now - self._begin) * (1 - ratio) / ratio
        self._send(wire.Progress(phase, ratio, eta_s))

    def _end_phase(self, now: float) -> None:
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._begin
        self._begin = now

    def timeline(self) -> str:
        """What each phase took so far, in order."""
        self._end_phase(self._clock())
        return ", ".join(f"{phase} {taken:.2f} s" for phase, taken in self._seconds.items())

    def located(self, folder: str) -> None:
        """Report where a model that was fetched lies."""
        self._send(wire.Located(folder))


def start(
    config: EngineConfig, report: Reporter, runner_spec: str = RUNNER, *, offline: bool = False
) -> tuple[EngineLoop, wire.Ready]:
    """Load the model, make its cache, draw a token; return the loop and what the API must know.

    `offline` is as `Limits` has it.
    """
    config = locate(config, report, report.located)
    if config.load_format != "dummy":
        read_ahead(Path(config.model), available_host_bytes() // 2)
    report("import", 0)
    runner = _load_model(config, report, runner_spec)
    report("cache", 0)
    limits = _limits(config, runner, offline=offline)
    num_blocks = size_pool(config, runner, limits)
    runner.allocate_kv(num_blocks + 1)
    report("warmup", 0)
    warm_up(runner, limits, num_blocks)
    swap = _swap_space(config, runner)
    scheduler = _scheduler(limits, num_blocks, config.scheduling_policy, swap)
    ready = wire.Ready(
        max_model_len=scheduler.max_len,
        vocab_size=runner.vocab_size,
        block_size=config.block_size,
        num_kv_blocks=num_blocks,
        max_num_seqs=limits.max_num_seqs,
        device=str(runner.device),
        dtype=runner.dtype_name,
        kv_bytes_per_block=runner.kv_bytes_per_block,
    )
    target_itl_s = None if config.target_itl_ms is None else config.target_itl_ms / 1000
    logger.info("started: %s", report.timeline())
    depth = config.pipeline_depth or PIPELINE_DEPTH.get(str(runner.device).split(":")[0], 1)
    return EngineLoop(scheduler, runner, target_itl_s=target_itl_s, depth=depth), ready


def _load_model(config: EngineConfig, report: Reporter, runner_spec: str) -> ModelRunner:
    """The runner with its weights, of which some were on their way before its module was there."""
    ahead = begin(config) if runner_spec == RUNNER else None
    try:
        make_runner = _load_attribute(runner_spec)
        report("check", 0)
        return make_runner(
            config.model,
            device=config.device,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            progress=report,
            num_threads=config.num_threads,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
            hf_overrides=config.hf_overrides,
            load_format=config.load_format,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enforce_eager=config.enforce_eager,
            deterministic=config.deterministic,
            ahead=ahead,
        )
    finally:
        if ahead is not None:
            ahead.close()


def read_ahead(folder: Path, most_bytes: int) -> threading.Thread:
    """Ask the kernel for the weights while torch is being imported, which takes seconds.

    At most `most_bytes`: what does not fit into memory would only be read twice.
    """

    def ask() -> None:
        left = most_bytes
        for path in sorted(folder.glob("*.safetensors")):
            left -= path.stat().st_size
            if left < 0:
                return
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read-ahead", daemon=True)
    thread.start()
    return thread


def _load_attribute(spec: str) -> Callable[..., ModelRunner]:
    """Import `module:attribute`; late, since this is what brings torch in."""
    module, _, name = spec.partition(":")
    attribute: Callable[..., ModelRunner] = getattr(importlib.import_module(module), name)
    return attribute


def size_pool(config: EngineConfig, runner: ModelRunner, limits: Limits) -> int:
    """Usable KV blocks: as many as asked for, else as memory gives and the batch can use."""
    size = runner.kv_bytes_per_block
    if config.num_kv_blocks is not None:
        asked, free = config.num_kv_blocks, runner.free_memory_for_kv(1.0)
        if (asked + 1) * size > free:
            raise DoesNotFitError(
                f"--num-kv-blocks {asked} needs {(asked + 1) * size // _MIB} MiB and "
                f"{free // _MIB} MiB are free; at most {max(0, free // size - 1)} fit"
            )
        return asked
    free = runner.free_memory_for_kv(config.gpu_memory_utilization)
    fit = free // size - 1
    each = limits.kv.blocks([limits.max_model_len], chunk=limits.max_num_batched_tokens)
    if fit < each:
        raise DoesNotFitError(
            f"the KV cache of one sequence of {runner.max_model_len} tokens needs "
            f"{each * size // _MIB} MiB and {max(0, free) // _MIB} MiB are free; set "
            f"--max-model-len to at most {max(0, limits.longest(max(0, fit)))}, or give more "
            "memory (--gpu-memory-utilization, the pod's memory limit)"
        )
    # Without a prefix cache, blocks beyond the largest batch would never be used.
    return fit if config.enable_prefix_caching else min(fit, each * config.max_num_seqs)


def _limits(config: EngineConfig, runner: ModelRunner, *, offline: bool) -> Limits:
    return Limits(
        block_size=config.block_size,
        max_model_len=runner.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=token_budget(
            config.max_num_batched_tokens, str(runner.device).split(":")[0]
        ),
        vocab_size=runner.vocab_size,
        eos_token_ids=frozenset(runner.eos_token_ids),
        enable_prefix_caching=config.enable_prefix_caching,
        kv_windows=runner.kv_windows,
        large_step=runner.large_step,
        offline=offline,
    )


def _scheduler(
    limits: Limits, num_blocks: int, policy: str, swap: SwapSpace | None = None
) -> Scheduler:
    return Scheduler(BlockPool(num_blocks), PolicyFactory.get_policy(policy), limits, swap)


def _swap_space(config: EngineConfig, runner: ModelRunner) -> SwapSpace | None:
    """As many blocks of host memory as were asked for; None where none were."""
    if not config.swap_space:
        return None
    size = runner.kv_bytes_per_block
    blocks = int(config.swap_space * 2**30) // size - 1  # one is the null block
    if blocks < 1:
        raise ConfigError(
            f"--swap-space {config.swap_space:g} is {config.swap_space * 1024:g} MiB, less than "
            f"two KV blocks of {size / _MIB:g} MiB each; give more, or 0 for none"
        )
    return SwapSpace(blocks, runner.allocate_swap(blocks + 1))


def warm_up(runner: ModelRunner, limits: Limits, num_blocks: int) -> None:
    """Draw two real tokens, one after a prompt and one by decoding, and check them."""
    loop = EngineLoop(_scheduler(limits, num_blocks, "fcfs"), runner)
    room = loop.scheduler.max_len - 1
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    loop.add(wire.AddRequest("warm-up", [0] * min(8, room), params))
    outputs = []
    while loop.has_work:
        outputs += loop.step()
    for output in outputs:
        if output.error is not None:
            raise ConfigError(f"no request would fit: {output.error}")
        if any(not 0 <= token < limits.vocab_size for token in output.token_ids):
            raise RunnerError(f"the model drew {output.token_ids}, outside its vocabulary")
    logger.info("first token drawn; %d KV blocks of %d tokens", num_blocks, limits.block_size)
