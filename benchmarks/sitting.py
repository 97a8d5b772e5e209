"""What the parts of a sitting share: the model, the rows, and processes that end in time.

A sitting is one lifetime of one machine: only figures of one sitting may be compared.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.bench.limits import Ceilings
from octavo.bench.workloads import SHAPES, write_shape, write_tokenizer

# Engines by name: the peer is who ours is held against, and sets the rate of a Poisson load.
OURS, PEER = "octavo", "vllm"
# The knobs that are the same for every engine.
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 512
MEMORY = 0.9
BLOCK_SIZE = 16
# Passes over a workload offline at most, and their seconds; see `octavo.bench.passes`.
PASSES, PASSES_S = 10, 8.0

# A peer's package is found here and calls nobody; its own build of a sampler needs a compiler.
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
_LAST_LINES = 25


@dataclass(frozen=True)
class Model:
    """One of `SHAPES`, or a folder with a config.json; `folder` is the same for all engines."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def of(cls, shape: str, scratch: Path) -> Model:
        """Writes what a shape's folder needs for a server: its config and a tokenizer."""
        if shape not in SHAPES:
            folder = Path(shape).resolve()
            return cls(folder.name, folder, json.loads((folder / "config.json").read_text()))
        folder = write_shape(shape, scratch / shape)
        if not (folder / "tokenizer.json").exists():
            write_tokenizer(SHAPES[shape]["vocab_size"], folder)
        return cls(shape, folder, SHAPES[shape])

    @property
    def max_model_len(self) -> int:
        return min(MAX_MODEL_LEN, int(self.config["max_position_embeddings"]))

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


@dataclass(frozen=True)
class Serving:
    """What servers get: `capacity` requests at once, then `poisson_s` seconds of arrivals. One that
    goes on preparing after its first token is waited for, `settle_s` seconds at most.
    """

    capacity: int = 700
    poisson_s: float = 45.0
    settle_s: float = 40.0


@dataclass
class Sitting:
    """Where rows go, and what each says of its origin. `ceilings` is None where unmeasured."""

    out: Path
    stamp: dict[str, Any]
    scratch: Path
    site: str | None = None
    requests: int | None = None  # of each workload; None: as many as it has
    deadline: float = float("inf")  # of the running part, by time.perf_counter
    ceilings: Ceilings | None = None
    serving: Serving = Serving()
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that the running part still has."""
        return self.deadline - time.perf_counter()

    def run(self, words: Sequence[str], *, peer: bool = False) -> Iterator[Any]:
        """The JSON objects that a command prints, within what the running part has left."""
        wait_for_free_gpu()
        return json_lines(words, self.environment(peer=peer), self.left, self.scratch)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row at once: what was measured outlives whatever fails next."""
        row = self.stamp | dict(row)
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def environment(self, *, peer: bool) -> dict[str, str]:
        """A child's environment: a peer sees its packages before all others.

        Children run in the scratch folder, where no folder has the name of a package.
        """
        env = os.environ | _QUIET
        paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        if peer and self.site:
            paths.insert(0, self.site)
        env["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths)
        return env


class PartError(Exception):
    """A part that measured nothing, with the reason as text."""


def json_lines(
    words: Sequence[str], env: Mapping[str, str], limit_s: float, cwd: Path | None = None
) -> Iterator[Any]:
    """The JSON objects that a command prints, as they come.

    Raises `PartError` with its last words if it fails, or if it runs for longer than `limit_s`
    seconds: it is killed then, and all that it started.
    """
    said = deque[str](maxlen=_LAST_LINES)
    late = threading.Event()
    process = subprocess.Popen(
        words, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, cwd=cwd,
    )  # fmt: skip

    def end() -> None:
        late.set()
        kill_group(process)

    watch = threading.Timer(max(0.0, limit_s), end)
    watch.start()
    try:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
            else:
                said.append(line)
        code = process.wait()
    finally:
        watch.cancel()
        kill_group(process)
        if process.stdout is not None:
            process.stdout.close()
    if late.is_set():
        raise PartError(f"killed after its {limit_s:.0f} s; it said: {''.join(said)[-1500:]}")
    if code:
        raise PartError(f"exit code {code}: {''.join(said)[-1500:]}")


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a group of its own, and the group; reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def elapsed(row: dict[str, Any]) -> Iterator[None]:
    """Note in `row["s"]` what the block took."""
    begin = time.perf_counter()
    yield
    row["s"] = round(time.perf_counter() - begin, 2)


def wait_for_free_gpu(limit_s: float = 20.0, used_mib: int = 3000) -> int | None:
    """Wait until a process that ended has given its memory back; MiB in use, None without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    end = time.perf_counter() + limit_s
    while True:
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode or not done.stdout.split():
            return None
        used = int(done.stdout.split()[0])
        if used < used_mib or time.perf_counter() > end:
            return used
        time.sleep(0.2)
