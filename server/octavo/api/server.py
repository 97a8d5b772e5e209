"""`octavo serve`: the API process from its first answer to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from octavo.api.direct import DirectProtocol
from octavo.api.engine_client import EngineClient
from octavo.api.engine_process import EngineProcess
from octavo.api.lifecycle import State
from octavo.api.limits import KEEP_ALIVE_S, MAX_HEADER_BYTES
from octavo.api.routes import build_app
from octavo.api.serving import Serving
from octavo.api.signals import END_SIGNALS, hear_signals
from octavo.config import ServeConfig, keep_tokenizer_single_threaded, model_source
from octavo.errors import ExitCode, OctavoError
from octavo.text.loader import load_text_side
from octavo.wire import Failed, Load, Located, Outputs, Progress, Ready

log = logging.getLogger("octavo.api")

# 128 + SIGTERM: the drain was cut short and requests ended with errors.
EXIT_CUT_SHORT = 143
POLL_S = 0.02
STALL_POLL_S = 0.25
# After the engine's end its last messages may still be on the way.
LAST_WORDS_S = 0.3
ENGINE_STOP_S = 5.0
LAST_RESPONSES_S = 5.0
# Each write of a stream gives the interpreter's lock away, and a thread that reads a long request
# would keep it for the default of 5 ms: for each write of each stream.
SWITCH_INTERVAL_S = 0.0005


def supervise(
    config: ServeConfig,
    listener: socket.socket,
    client: EngineClient,
    engine: subprocess.Popen[bytes],
    began: float,
) -> int:
    """Serve beside an engine process that was started at `began` (monotonic seconds)."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    keep_tokenizer_single_threaded()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(_Supervisor(config, listener, client, EngineProcess(engine), began).run())


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor decides when the server ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Supervisor:
    """Runs the HTTP server beside the engine process and decides how it all ends."""

    def __init__(
        self,
        config: ServeConfig,
        listener: socket.socket,
        client: EngineClient,
        process: EngineProcess,
        began: float,
    ) -> None:
        self._config = config
        self._listener = listener
        self._client = client
        self._process = process
        self._serving = Serving(config, self._client)
        self._life = self._serving.lifecycle
        self._life.on_begun(began)
        self._http = _HttpServer(
            uvicorn.Config(
                build_app(self._serving),
                http=DirectProtocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_RESPONSES_S),
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurry = False

    async def run(self) -> int:
        """Run to the end; the exit code."""
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._catch_signals()
        http = asyncio.ensure_future(self._http.serve(sockets=[self._listener]))
        host, port = self._listener.getsockname()[:2]
        log.info("listening on http://%s:%d", host, port)
        self._spawn(self._read_engine())
        self._spawn(self._watch_process())
        self._spawn(self._watch_start())
        # A hub's model is fetched by the engine, which then says where it lies.
        if model_source(self._config.engine) == "path":
            self._spawn(self._load_text(self._config.engine.model))
        try:
            return await self._exit
        finally:
            await self._close(http)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the rest; its failure is a bug that ends the server."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)
            self._give_up(ExitCode.FAILED, f"bug in the API process: {error!r}")

    # The start

    async def _load_text(self, folder: str) -> None:
        try:
            self._serving.text = await asyncio.to_thread(
                load_text_side, folder, self._config.chat_template, self._config.generation_config
            )
        except OctavoError as error:
            self._fail(Failed(error.reason, str(error), error.retryable))
            await self._process.end(patience=0)
        else:
            self._life.on_text_ready()
            self._settle_if_ready()

    async def _watch_start(self) -> None:
        limit = self._config.startup_stall_timeout
        while self._life.state is State.STARTING:
            if self._life.start_stalled_for() > limit:
                progress = self._life.progress
                self._give_up(
                    ExitCode.STALLED,
                    f"the start made no progress for {limit:g} s in phase {progress.phase} "
                    f"({progress.ratio:.0%}); raise --startup-stall-timeout if the storage is slow",
                )
                return
            await asyncio.sleep(min(STALL_POLL_S, limit / 4))

    def _settle_if_ready(self) -> None:
        engine = self._life.engine
        if self._life.state is State.READY and engine is not None:
            # What lives now lives to the end: keep the collector from walking it again and again.
            gc.collect()
            gc.freeze()
            log.info(
                "ready: %s on %s (%s), %d KV blocks of %d tokens, context %d tokens",
                self._config.served_model_names[0],
                engine.device,
                engine.dtype,
                engine.num_kv_blocks,
                engine.block_size,
                engine.max_model_len,
            )

    # The engine's messages and its end

    async def _read_engine(self) -> None:
        async for message in self._client.messages():
            match message:
                case Outputs():
                    self._life.on_output()
                    self._life.on_in_flight(self._client.in_flight)
                case Load():
                    self._life.on_load(message)
                case Progress():
                    self._life.on_progress(message)
                case Located():
                    self._spawn(self._load_text(message.folder))
                case Ready():
                    self._life.on_ready(message)
                    self._settle_if_ready()
                case Failed():
                    self._fail(message)

    async def _watch_process(self) -> None:
        how = await self._process.wait()
        await asyncio.sleep(LAST_WORDS_S)
        if self._life.failure is None and not self._exit.done():
            self._give_up(ExitCode.FAILED, how)

    def _fail(self, failure: Failed) -> None:
        """A failure told by the engine or found in the model."""
        if failure.retryable:
            self._give_up(ExitCode.FAILED, failure.message, failure)
            return
        # Starting again would not help, so the server stays up to say why.
        log.error("cannot serve: %s: %s", failure.reason, failure.message)
        self._life.on_failed(failure)
        self._client.fail_all(failure.message)

    def _give_up(self, code: int, message: str, failure: Failed | None = None) -> None:
        """End the server: every request gets its error, Kubernetes gets the message."""
        if self._exit.done():
            return
        log.error("giving up: %s", message)
        self._life.on_failed(failure or Failed("EngineFailed", message, retryable=True))
        self._client.fail_all(message)
        _write_termination_message(self._config.termination_log, message)
        self._exit.set_result(code)

    # The end

    def _catch_signals(self) -> None:
        # Not by the loop's own handlers: those are taken back when it closes, and for the moment
        # until the process has ended a signal would kill it.
        loop = asyncio.get_running_loop()
        for number in END_SIGNALS:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._on_signal))
        hear_signals()

    def _on_signal(self) -> None:
        if self._life.state is State.DRAINING or self._hurry:
            log.warning("second signal: ending unfinished requests")
            self._hurry = True
            return
        log.info("draining: %d unfinished requests", self._serving.admission.unfinished)
        self._life.on_drain()
        self._spawn(self._drain())

    async def _drain(self) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.drain_timeout
        admission = self._serving.admission
        while (
            admission.unfinished and clock() < deadline and not self._hurry and not self._life.hung
        ):
            await asyncio.sleep(POLL_S)
        cut = admission.unfinished
        if cut:
            log.warning("drain ended with %d unfinished requests", cut)
            self._client.fail_all("the server is shutting down")
        if not self._exit.done():
            self._exit.set_result(EXIT_CUT_SHORT if cut else ExitCode.OK)

    async def _close(self, http: asyncio.Future[None]) -> None:
        """Let the last answers out, then end the engine and the HTTP server."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + LAST_RESPONSES_S
        while self._serving.admission.unfinished and clock() < deadline:
            await asyncio.sleep(POLL_S)
        self._client.stop()
        # Only an engine that served and drained in time deserves patience.
        clean = self._exit.done() and self._exit.result() == ExitCode.OK
        await self._process.end(ENGINE_STOP_S if clean and self._life.engine else 0)
        self._http.should_exit = True
        await asyncio.gather(http, return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._serving.close()
        for number in END_SIGNALS:  # nothing is left but to end
            signal.signal(number, signal.SIG_IGN)


def _write_termination_message(path: str, message: str) -> None:
    """Put the message where Kubernetes shows it; outside a pod there is no such place."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(message)
    except OSError as error:
        log.debug("no termination message at %s: %s", path, error)
