"""The engine process: sockets, messages, pace; the deciding is done in the loop."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import zmq

from octavo import wire
from octavo.config import EngineConfig, Parser, limit_threads
from octavo.engine.loop import EngineLoop
from octavo.engine.startup import RUNNER, Reporter, start
from octavo.errors import DeviceError, ExitCode, OctavoError

BUSY_LOAD_S = 0.05
IDLE_LOAD_S = 1.0
LINGER_MS = 2000
PR_SET_PDEATHSIG = 1
# What the log says when no idle moment will be used for graphs any more.
PREPARED = "prepared for every size of step"

logger = logging.getLogger(__name__)


class Link:
    """The two sockets to the API process, which binds them."""

    def __init__(self, socket_dir: Path) -> None:
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        for socket in (self._requests, self._events):
            # No high-water mark: a slow API process must not stop the steps of everybody. What can
            # pile up is bounded by the requests that it let in.
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._requests.connect(f"ipc://{socket_dir}/requests.sock")
        self._events.connect(f"ipc://{socket_dir}/events.sock")

    def send(self, message: wire.ToApi) -> None:
        """Queue a message for the API process."""
        self._events.send(wire.encoder.encode(message))

    def receive(self, timeout_s: float) -> list[wire.ToEngine]:
        """Everything that has come; waits up to `timeout_s` for a first message."""
        if not self._requests.poll(math.ceil(timeout_s * 1000)):
            return []
        messages = []
        try:
            while True:
                frame = self._requests.recv(zmq.NOBLOCK)
                messages.append(wire.to_engine_decoder.decode(frame))
        except zmq.Again:
            return messages

    def close(self) -> None:
        """Let queued messages out, for a bounded time, and close."""
        self._requests.close(0)
        self._events.close()
        self._context.term()


class Server:
    """Drives the loop by messages: without waiting while there is work, blocked while not."""

    def __init__(self, loop: EngineLoop, link: Link, parent: int) -> None:
        self._loop = loop
        self._link = link
        self._parent = parent
        self._last_load = float("-inf")
        self._was_busy = False
        self._unchecked = False
        self._preparing = True
        self._audit: Iterator[None] | None = None

    def run(self) -> None:
        """Serve until told to stop, or until the API process is gone."""
        while os.getppid() == self._parent:
            for message in self._link.receive(self._patience()):
                if isinstance(message, wire.Stop):
                    self._loop.abort_all()
                    self._step()
                    return
                self._take(message)
            self._step()
            self._report()
            if not self._loop.has_work:
                self._use_idle_moment()

    def _patience(self) -> float:
        if self._loop.has_work or self._preparing or self._audit is not None:
            return 0.0
        return max(0.0, self._last_load + IDLE_LOAD_S - time.monotonic())

    def _take(self, message: wire.AddRequest | wire.AbortRequest) -> None:
        # Whatever was checked may change now.
        self._audit, self._unchecked = None, True
        if isinstance(message, wire.AddRequest):
            self._loop.add(message)
        else:
            self._loop.abort(message.request_id, message.index)

    def _step(self) -> None:
        outputs = self._loop.step()
        if outputs:
            self._link.send(wire.Outputs(outputs))

    def _report(self) -> None:
        """Send the load when it is due, and at once when the last request ended."""
        now, busy = time.monotonic(), self._loop.has_work
        ended = self._was_busy and not busy
        due = now - self._last_load >= (BUSY_LOAD_S if busy else IDLE_LOAD_S)
        self._was_busy = busy
        self._unchecked |= busy
        if not due and not ended:
            return
        self._link.send(self._loop.load())
        self._last_load = now
        # After a quiet second, not at once: a next request may be near.
        if self._unchecked and not busy and not ended:
            self._audit = self._loop.scheduler.audit()
            self._unchecked = False

    def _use_idle_moment(self) -> None:
        """Prepare one kind of step, or go on with the check of the books by one short turn."""
        if self._preparing:
            self._preparing = self._loop.prepare_one()
            if not self._preparing:
                logger.info(PREPARED)
        elif self._audit is not None and next(self._audit, True):
            self._audit = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the engine; the exit code says whether starting again can help."""
    args = _parse(argv)
    parent = _follow_parent(args.parent)
    _set_up_process()
    link = Link(args.socket_dir)
    try:
        _serve(args.config_json, args.runner, link, parent)
    except DeviceError as error:
        code = _fail(link, error.reason, str(error), retryable=True)
        link.close()
        logging.shutdown()
        # Taking CUDA down in order could wait for ever for what is on the device.
        os._exit(code)
    except OctavoError as error:
        return _fail(link, error.reason, str(error), retryable=error.retryable)
    except Exception as error:
        logger.exception("the engine failed")
        return _fail(link, "EngineFailed", f"{type(error).__name__}: {error}", retryable=True)
    finally:
        link.close()
    return ExitCode.OK


def _serve(config_json: str, runner_spec: str, link: Link, parent: int) -> None:
    report = Reporter(link.send)
    report("import", 0)
    config = EngineConfig.from_json(config_json)
    if config.num_threads is not None:
        limit_threads(config.num_threads)
    gc.disable()  # it would walk torch's modules again and again while they are imported
    loop, ready = start(config, report, runner_spec)
    # What lives now lives to the end: keep the collector from walking it ever again.
    gc.collect()
    gc.freeze()
    gc.enable()
    link.send(ready)
    Server(loop, link, parent).run()


def _fail(link: Link, reason: str, message: str, *, retryable: bool) -> int:
    logger.error("%s: %s", reason, message)
    link.send(wire.Failed(reason, message, retryable))
    return ExitCode.FAILED if retryable else ExitCode.CONFIG


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m octavo.engine", description="Started by `octavo serve`.")
    parser.add_argument("--socket-dir", type=Path, required=True)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--parent", type=int, help="process id (default: whose child this is)")
    # For tests: any `module:attribute` with the signature of octavo.engine.runner.Runner.
    parser.add_argument("--runner", default=RUNNER, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _follow_parent(parent: int | None) -> int:
    """Ask the kernel to kill us when the parent dies; return the parent's process id.

    The kernel watches the thread that started us, so the API process starts the engine from a
    thread that stays. `parent` is who that was, for the moment before this call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit(ExitCode.FAILED)
    return os.getppid()


def _set_up_process() -> None:
    """Signals and logs. The API process drives the end; a signal to the group is not for us."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # The API process started us with these held back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    faulthandler.enable()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s engine: %(message)s",
    )
