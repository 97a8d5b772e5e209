"""`octavo serve` begins: the engine's process first, then what the API process has to import.

The engine imports torch for seconds, this process the web stack for more than one; so neither waits
for the other. Nothing heavy may be imported here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from octavo.api.signals import signals_wait
from octavo.config import ServeConfig
from octavo.errors import ConfigError

ENGINE_COMMAND = (sys.executable, "-m", "octavo.engine")
# A unix socket's path has at most 107 bytes.
MAX_FOLDER_CHARS = 80


def serve(config: ServeConfig, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until told to stop or until the engine is lost; return the process's exit code."""
    with (
        signals_wait(),
        contextlib.closing(listen(config.host, config.port)) as listener,
        _socket_folder() as folder,
        _engine(engine_command, folder, config.engine.to_json()) as engine,
    ):
        began = time.monotonic()
        from octavo.api.engine_client import EngineClient

        # Its sockets are there before the engine has something to say.
        with contextlib.closing(EngineClient(folder)) as client:
            from octavo.api.server import supervise  # heavy: the web stack

            return supervise(config, listener, client, engine, began)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Who connects before the server is up waits instead of being refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    # Connections inherit it. asyncio sets it for sockets that name their protocol, and these do
    # not: a small write would wait for the client to acknowledge the one before, up to 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    """A private folder with a path short enough for unix sockets."""
    try:
        folder = tempfile.mkdtemp(prefix="octavo-")
        if len(folder) > MAX_FOLDER_CHARS:
            shutil.rmtree(folder)
            folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
    except OSError as error:
        raise ConfigError(
            f"cannot make a folder for the engine's sockets: {error.strerror or error}; give the "
            "server a /tmp that it may write to, such as an emptyDir, or set TMPDIR to another"
        ) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _engine(
    command: Sequence[str], folder: Path, config_json: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The engine's process, with the wire's folder and its configuration; it never outlives this.

    It gets a session of its own, so that a terminal's Ctrl-C reaches only the API process, which
    then decides; it follows its parent's death by itself. To be called from the main thread: the
    kernel reports the death of the thread that started it.
    """
    words = (
        "--socket-dir",
        str(folder),
        "--config-json",
        config_json,
        "--parent",
        str(os.getpid()),
    )
    process = subprocess.Popen(  # noqa: S603 (our own command, without a shell)
        (*command, *words), stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()  # nothing, if it has ended
        process.wait()
