"""Servers under one client: from the process's start to its first token, at capacity, under load.

`python -m vllm.entrypoints.openai.api_server` and `octavo serve` get the same knobs, the same
requests and the same clock: `octavo.bench.load`, an open loop over HTTP.
"""

from __future__ import annotations

import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from sitting import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    MEMORY,
    OURS,
    PEER,
    Model,
    PartError,
    Sitting,
    kill_group,
    wait_for_free_gpu,
)

from octavo.bench.load import Target, run_load
from octavo.bench.workloads import digest, draw
from octavo.engine.process import PREPARED as OURS_PREPARED

_AT_ONCE = float("inf")
NAME = "m"
HOST = "127.0.0.1"
POLL_S = 0.05
STOP_S = 15.0
WARM_UP_REQUESTS = 64
# Ours goes on capturing graphs in idle moments after its first token; then its log says this.
PREPARED = {OURS: OURS_PREPARED}
POISSON_SEED = 11
# A Poisson load that is cut to less than this share of its time is none.
LEAST_SHARE = 1 / 3
# For the last answers of a Poisson load.
LAST_ANSWERS_S = 20.0
SHARE_OF_CAPACITY = 0.7
# An answer that takes longer has failed.
ANSWER_S = 90.0
LEAST_ANSWER_S = 10.0
# What a peer's log says of its start.
_PHASES = re.compile(
    r"(Model loading took .*|torch\.compile took .*|Graph capturing finished .*|init engine .*)"
)


def octavo_command(model: Model, port: int) -> list[str]:
    return [
        sys.executable, "-m", "octavo.cli", "serve", str(model.folder), "--host", HOST,
        "--port", str(port), "--served-model-name", NAME, *_knobs(model),
        "--max-queue", "100000",
    ]  # fmt: skip


def vllm_command(model: Model, port: int) -> list[str]:
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.folder),
        "--host", HOST, "--port", str(port), "--served-model-name", NAME, *_knobs(model),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip


def _knobs(model: Model) -> list[str]:
    return [
        "--dtype", "bfloat16", "--max-model-len", str(model.max_model_len),
        "--max-num-seqs", str(MAX_NUM_SEQS), "--gpu-memory-utilization", str(MEMORY),
        "--block-size", str(BLOCK_SIZE), "--no-enable-prefix-caching", "--seed", "0",
    ]  # fmt: skip


COMMANDS: dict[str, Callable[[Model, int], list[str]]] = {
    OURS: octavo_command,
    PEER: vllm_command,
}


class Server:
    """A server process on a free port, from its start to its end.

    Raises `PartError` with the end of its log if it ends early or draws no token in time.
    """

    def __init__(self, words: Sequence[str], port: int, env: dict[str, str], log: Path) -> None:
        self._port, self._log = port, log
        self._begin = time.perf_counter()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words, env=env, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, text=True, cwd=log.parent,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        kill_group(self._process)

    def target(self, left_s: float) -> Target:
        """Where a load goes; an answer that is not there in `left_s` seconds has failed."""
        if left_s < LEAST_ANSWER_S:
            raise PartError(f"{max(0.0, left_s):.0f} s are left, too few for a load")
        return Target(f"http://{HOST}:{self._port}", NAME, min(ANSWER_S, left_s))

    def says(self, word: str, limit_s: float) -> bool:
        """Wait until it stands in the log, at most so many seconds; whether it does."""
        end = time.perf_counter() + limit_s
        while word not in self._log.read_text(errors="replace"):
            if time.perf_counter() > end or self._process.poll() is not None:
                return False
            time.sleep(POLL_S)
        return True

    def first_token(self, limit_s: float) -> float:
        """Seconds from the process's start to the first token that came over HTTP."""
        end = time.perf_counter() + limit_s
        while not self._draws_a_token(end - time.perf_counter()):
            if self._process.poll() is not None:
                raise PartError(f"exit code {self._process.returncode}: {self.last_words()}")
            if time.perf_counter() > end:
                raise PartError(f"no token within {limit_s:.0f} s: {self.last_words()}")
            time.sleep(POLL_S)
        return time.perf_counter() - self._begin

    def _draws_a_token(self, timeout_s: float) -> bool:
        body = {"model": NAME, "prompt": list(range(11, 27)), "max_tokens": 1, "temperature": 0}
        status, _ = self._ask("POST", "/v1/completions", json.dumps(body), max(1.0, timeout_s))
        return status == 200

    def _ask(self, verb: str, path: str, body: str | None, timeout_s: float) -> tuple[int, bytes]:
        """Status and body; status 0 where nobody answers yet."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout_s)
        try:
            connection.request(verb, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def phases(self) -> dict[str, Any]:
        """What the start took by phase: ours says it, of a peer its log does."""
        status, body = self._ask("GET", "/startupz", None, 5.0)
        if status == 200:
            return dict(json.loads(body).get("seconds", {}))
        return {"log": _PHASES.findall(self._log.read_text(errors="replace"))[:8]}

    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def start(sitting: Sitting, engine: str, model: Model) -> Server:
    """Start `engine` on the model's folder, once the device's memory is free."""
    wait_for_free_gpu()
    port = free_port()
    env = sitting.environment(peer=engine != OURS)
    log = sitting.scratch / f"{engine}-{port}.log"
    return Server(COMMANDS[engine](model, port), port, env, log)


def cold_start(sitting: Sitting, engine: str, model: Model, rep: int) -> Iterator[dict[str, Any]]:
    """Process start to first token, from the files of the page cache, and nothing else."""
    with start(sitting, engine, model) as server:
        yield _first_token(server, engine, rep, sitting.left)


def under_load(sitting: Sitting, engine: str, model: Model, rep: int) -> Iterator[dict[str, Any]]:
    """First token, warm-up, capacity, then Poisson arrivals at 70 % of vLLM's capacity."""
    if engine == OURS and sitting.site and not _capacities(sitting.rows, PEER):
        raise PartError("the peer's capacity, which sets the rate for both, is not measured yet")
    with start(sitting, engine, model) as server:
        yield _first_token(server, engine, rep, sitting.left)
        _allow_many_sockets()
        if engine in PREPARED:
            yield _prepared(server, engine, rep, min(sitting.serving.settle_s, sitting.left))
        warm_up = draw("sharegpt", model.vocab_size, WARM_UP_REQUESTS, seed=1)
        run_load(server.target(sitting.left), warm_up, _AT_ONCE)
        most = sitting.serving.capacity if sitting.requests is None else sitting.requests
        yield from _load(server.target(sitting.left), engine, model, _AT_ONCE, most, rep)
        rate, origin = poisson_rate(sitting.rows)
        wanted = sitting.serving.poisson_s
        seconds = min(wanted, sitting.left - LAST_ANSWERS_S)
        if sitting.requests is not None:
            seconds = min(seconds, sitting.requests / rate)
        elif seconds < LEAST_SHARE * wanted:
            raise PartError(f"{sitting.left:.0f} s are left, too few for a load of its own")
        count = poisson_count(sitting.rows, max(1, round(rate * seconds)))
        target = server.target(sitting.left - count / rate)
        for row in _load(target, engine, model, rate, count, rep):
            yield row | {"rate_from": origin}


def _allow_many_sockets() -> None:
    """One for each request that is open; what is allowed at first is often 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))


def _first_token(server: Server, engine: str, rep: int, limit_s: float) -> dict[str, Any]:
    seconds = server.first_token(limit_s)
    return {
        "engine": engine, "load": "cold-start", "rep": rep, "metric": "first_token_s",
        "value": round(seconds, 3), "limit": None, "detail": {"phases": server.phases()},
    }  # fmt: skip


def _prepared(server: Server, engine: str, rep: int, limit_s: float) -> dict[str, Any]:
    """Seconds from the first token until nothing is left to prepare; None where it took longer."""
    begin = time.perf_counter()
    said = server.says(PREPARED[engine], limit_s)
    seconds = round(time.perf_counter() - begin, 2) if said else None
    return {
        "engine": engine, "load": "cold-start", "rep": rep, "metric": "prepared_s",
        "value": seconds, "limit": None,
    }  # fmt: skip


def poisson_rate(rows: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """70 % of vLLM's capacity in requests a second; of our own where it has none, and who it was.

    The first capacity of a sitting counts, so that every engine gets the same rate.
    """
    for engine in (PEER, OURS):
        for capacity in _capacities(rows, engine):
            return round(SHARE_OF_CAPACITY * capacity, 3), engine
    raise PartError("no server's capacity was measured, so there is no rate to send at")


def _capacities(rows: Sequence[dict[str, Any]], engine: str) -> list[float]:
    """In requests a second, the first one first."""
    return [
        row["value"]
        for row in rows
        if (row.get("load"), row.get("engine"), row["metric"]) == ("capacity", engine, "req_s")
    ]


def poisson_count(rows: Sequence[dict[str, Any]], most: int) -> int:
    """As many requests as the first server of the sitting got: others are not compared.

    It may have been short of time. Raises `PartError` where there is time for fewer now.
    """
    count: int = next((row["requests"] for row in rows if row.get("load") == "poisson"), most)
    if count > most:
        raise PartError(f"time for {most} requests; the other server got {count}")
    return count


def _load(
    target: Target, engine: str, model: Model, rate: float, count: int, rep: int
) -> Iterator[dict[str, Any]]:
    """One load's rows: requests a second at capacity, else the percentiles that its users feel."""
    requests = draw("sharegpt", model.vocab_size, count)
    found = run_load(target, requests, rate, POISSON_SEED)
    if not found["completed"]:
        raise PartError(f"no request of {count} was answered: {found['first_errors']}")
    capacity = rate == _AT_ONCE
    values = {"req_s": found["req_s"], "out_tok_s": found["out_tok_s"]}
    if not capacity:
        for name in ("tpot_ms", "ttft_ms", "gap_ms"):
            values |= {f"{name[:-3]}_{p}_ms": found[name].get(p) for p in ("p50", "p90", "p99")}
    own = {
        "engine": engine, "load": "capacity" if capacity else "poisson", "rep": rep,
        "digest": digest(requests), "rate": None if capacity else rate,
        "completed": found["completed"], "requests": count,
    }  # fmt: skip
    for at, (metric, value) in enumerate(values.items()):
        detail = {} if at else {"detail": found}
        yield own | {"metric": metric, "value": value, "limit": None} | detail
