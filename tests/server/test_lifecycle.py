"""Start, drain, death, stall and failure: by a clock of our own, then with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from api_server import FAKE, MODEL, ApiServer, eventually, running

from octavo.api import launch
from octavo.api.admission import Admission
from octavo.api.engine_process import describe_exit
from octavo.api.lifecycle import Lifecycle, State
from octavo.api.load_report import load_report
from octavo.api.server import LAST_WORDS_S
from octavo.errors import ConfigError
from octavo.wire import Blocks, Failed, Load, Progress, Ready

READY = Ready(64, 100, 16, 32, 4, "cpu", "float32", 1024)
TEXT = "/v1/completions"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def load(steps: int = 0, running: int = 0, waiting: int = 0) -> Load:
    return Load(
        blocks=Blocks(32, 8, 2, 4, 20), block_size=16, kv_utilization=0.25,
        demand_blocks={"now": 9}, seconds_to_exhaustion=None, running=running, waiting=waiting,
        waiting_blocks=1, prefill_backlog_s=0.0, step_budget_used=0.5, preemptions=3, steps=steps,
        prompt_tokens=7, generation_tokens=8, prefix_cache_queries=90, prefix_cache_hits=60,
        last_activity=5.0,
    )  # fmt: skip


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def life(clock: Clock) -> Lifecycle:
    return Lifecycle(hung_after=60, clock=clock)


def ready(life: Lifecycle) -> Lifecycle:
    life.on_text_ready()
    life.on_ready(READY)
    return life


# Decisions


def test_ready_needs_the_engine_and_the_tokenizer(life: Lifecycle) -> None:
    life.on_ready(READY)
    assert life.state is State.STARTING
    life.on_text_ready()
    assert life.state is State.READY
    assert life.serving


def test_only_a_change_of_progress_counts(life: Lifecycle, clock: Clock) -> None:
    life.on_progress(Progress("weights", 0.5, 9))
    clock.now += 10
    life.on_progress(Progress("weights", 0.5, 8))
    assert life.start_stalled_for() == 10
    life.on_progress(Progress("weights", 0.6, 8))
    assert life.start_stalled_for() == 0
    clock.now += 10
    life.on_ready(READY)
    assert life.start_stalled_for() == 0


def test_the_start_s_seconds_are_told_by_phase(life: Lifecycle, clock: Clock) -> None:
    clock.now += 2
    life.on_progress(Progress("weights", 0.0))
    clock.now += 3
    life.on_progress(Progress("weights", 1.0))
    assert life.start_seconds == {"import": 2, "weights": 3}
    life.on_progress(Progress("warmup", 0.0))
    clock.now += 0.5
    life.on_ready(READY)
    clock.now += 100
    assert life.start_seconds == {"import": 2, "weights": 3, "warmup": 0.5}


def test_the_first_phase_begins_with_the_engine_s_process(life: Lifecycle, clock: Clock) -> None:
    life.on_begun(clock.now - 1.5)
    assert life.start_stalled_for() == 0, "nobody could see progress yet"
    clock.now += 0.5
    life.on_progress(Progress("weights", 0.0))
    assert life.start_seconds == {"import": 2.0, "weights": 0.0}


def test_hung_means_work_and_no_step(life: Lifecycle, clock: Clock) -> None:
    ready(life)
    clock.now += 1000
    assert not life.hung, "no work"
    life.on_in_flight(1)
    assert not life.hung, "the work is new"
    clock.now += 59
    life.on_load(load(steps=5, running=1))
    clock.now += 59
    life.on_load(load(steps=6, running=1))
    clock.now += 59
    life.on_load(load(steps=6, running=1))
    assert not life.hung
    clock.now += 2
    assert life.hung
    assert not life.serving
    life.on_output()
    assert not life.hung


def test_a_drain_does_not_hide_a_failure(life: Lifecycle) -> None:
    ready(life)
    life.on_failed(Failed("ModelInvalid", "first", False))
    life.on_failed(Failed("Other", "second", True))
    life.on_drain()
    assert life.state is State.FAILED
    report = load_report(life, 0)
    assert report["failure"] == {
        "reason": "ModelInvalid", "message": "first", "retryable": False,
    }  # fmt: skip
    assert report["draining"] is False


def test_the_report_while_starting(life: Lifecycle) -> None:
    life.on_progress(Progress("weights", 0.41, 12))
    report = load_report(life, 0)
    assert report["state"] == "Starting"
    assert report["progress"] == {"phase": "weights", "ratio": 0.41, "eta_s": 12}
    assert report["blocks"] is None
    assert report["running"] == report["waiting"] == report["kv_utilization"] == 0


def test_the_report_counts_what_the_engine_has_not_seen(life: Lifecycle, clock: Clock) -> None:
    ready(life).on_load(load(running=2, waiting=1))
    assert load_report(life, 3)["waiting"] == 1
    assert load_report(life, 7)["waiting"] == 5
    assert load_report(life, 1)["waiting"] == 1
    life.on_in_flight(3)
    assert "stale_s" not in load_report(life, 3)
    clock.now += 6
    assert load_report(life, 3)["stale_s"] == 6
    life.on_in_flight(0)
    assert "stale_s" not in load_report(life, 0)


def test_admission_is_all_or_nothing_and_gives_places_back() -> None:
    admission = Admission(4)
    assert admission.enter(3)
    assert not admission.enter(2)
    assert admission.unfinished == 3
    assert admission.retry_after(1) == 1
    for _ in range(60):
        admission.leave(1, 100.0)
        assert admission.enter(1)
    assert admission.retry_after(100) == 3  # three ahead, 100 s each, 100 at once
    assert admission.retry_after(1) == 30


def test_how_an_engine_ended_is_said_in_words() -> None:
    assert describe_exit(-9) == (
        "the engine process was killed by SIGKILL; the usual cause is the container's memory limit"
    )
    assert describe_exit(1) == "the engine process ended with exit code 1"


# Processes


class Stream:
    """A streaming completion in a thread, with all that came."""

    def __init__(self, server: ApiServer, max_tokens: int) -> None:
        self.text = ""
        self.status: int | None = None
        self._body = {"prompt": "one two", "max_tokens": max_tokens, "stream": True}
        self._url = server.url + TEXT
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=30) as answer:
            self.status = answer.status_code
            for piece in answer.iter_text():
                self.text += piece

    def end(self) -> str:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.text


def test_the_api_answers_before_the_engine_is_up(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with running(tmp_path, engine=["--start-when", str(go)], ready=False) as server:
        assert server.status("/livez") == 200
        eventually(lambda: "0.25" in server.http.get("/startupz").text, what="progress")
        starting = server.http.get("/startupz")
        assert starting.status_code == 503
        report = starting.json()
        assert report.pop("seconds").keys() == {"import", "weights"}
        assert report == {"phase": "weights", "ratio": 0.25, "eta_s": 1.0}
        assert server.status("/readyz") == server.status("/health") == 503
        refused = server.http.post(TEXT, json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert server.load()["state"] == "Starting"
        assert "vllm:num_requests_running" in server.http.get("/metrics").text
        go.touch()
        server.until_ready()
        assert server.status("/startupz") == server.status("/health") == 200
        server.terminate()
        assert server.exit_code() == 0
    assert not server.termination_log.exists()


# What may be imported before the engine is on its way.
LAUNCH = """
import sys
from octavo.api import launch
heavy = {"asyncio", "fastapi", "uvicorn", "tokenizers", "jinja2", "zmq", "torch", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""

# The web stack cannot be imported, as where a package is missing.
WITHOUT_THE_WEB_STACK = """
import functools, sys
from octavo import cli
from octavo.api import launch
sys.modules["octavo.api.server"] = None
launch.serve = functools.partial(launch.serve, engine_command=sys.argv[2:])
sys.exit(cli.main(["serve", sys.argv[1], "--host", "127.0.0.1", "--port", "0"]))
"""


def run_python(code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | env,
    )  # fmt: skip


def test_nothing_heavy_is_imported_before_the_engine_s_process() -> None:
    assert run_python(LAUNCH).stdout.strip() == "[]"


def test_an_engine_is_started_first_and_does_not_outlive_an_import_that_fails(
    tmp_path: Path,
) -> None:
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    engine = (sys.executable, "-c", code, str(tmp_path / "pid"))
    words = (str(MODEL), *engine)
    run = run_python(SLOWLY + WITHOUT_THE_WEB_STACK, *words, TMPDIR=str(tmp_path))
    assert "octavo.api.server" in run.stderr
    assert run.returncode == 1
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
    assert not list(tmp_path.glob("octavo-*")), "the sockets' folder"


# ... which takes its time, so that the engine has begun by then.
SLOWLY = """
import octavo.api.engine_client as client, time
make = client.EngineClient
client.EngineClient = lambda folder: (time.sleep(1.5), make(folder))[1]
"""


def test_bad_input_costs_no_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [str(FAKE), "--pid-file", str(tmp_path / "pid"), "--", str(MODEL)]
        run = subprocess.run(
            [sys.executable, *words, "--host", "127.0.0.1", "--port", port],
            capture_output=True, text=True, timeout=60,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    assert run.returncode == 78
    refusal = f"octavo: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert [line[: len(refusal)] for line in run.stderr.splitlines()] == [refusal]
    assert not (tmp_path / "pid").exists()


def test_a_server_without_a_place_for_its_sockets_says_so(monkeypatch) -> None:
    def refuse(**_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(launch.tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match=r"\['/tmp'\]; give the server a /tmp"):
        with launch._socket_folder():
            pytest.fail("there is no such folder")


def test_a_sigterm_before_the_server_is_up_is_not_lost(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("wb")
    flags = ["--pid-file", str(tmp_path / "pid"), "--start-when", str(tmp_path / "never")]
    words = [str(FAKE), *flags, "--", str(MODEL), "--host", "127.0.0.1", "--port", "0"]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with log, subprocess.Popen([sys.executable, *words], stderr=log, env=os.environ | paths) as run:
        eventually((tmp_path / "pid").exists, 20, "the engine's start")
        run.terminate()
        assert run.wait(30) == 0, (tmp_path / "log").read_text()
    assert "draining: 0" in (tmp_path / "log").read_text()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    assert not list(tmp_path.glob("octavo-*"))


def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    with running(tmp_path, engine=["--step-ms", "10"]) as server:
        stream = Stream(server, 120)
        eventually(lambda: stream.text, what="first text")
        server.terminate()
        eventually(lambda: server.status("/readyz") == 503, 1, "readyz 503")
        assert server.status("/livez") == 200
        assert server.load()["draining"] is True
        assert server.load()["state"] == "Draining"
        refused = server.http.post(TEXT, json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "shutting down" in refused.json()["error"]["message"]
        assert "octavo_draining" in server.http.get("/metrics").text
        text = stream.end()
        assert text.count("data: [DONE]") == 1
        assert '"finish_reason":"length"' in text
        assert "error" not in text
        assert server.exit_code() == 0
        assert server.journal()[-1]["kind"] == "Stop"
        engine_is_gone(server)


def engine_is_gone(server: ApiServer) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(server.engine_pid(), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_asks_for_the_end_again_and_again_gets_it_once(number: int, tmp_path: Path) -> None:
    with running(tmp_path, engine=["--step-ms", "10"]) as server:
        pid = server.engine_pid()
        while server.process.poll() is None:
            server.process.send_signal(number)
            time.sleep(0.001)
        assert server.exit_code() == 0, server.log()
        assert "Traceback" not in server.log()
    assert not Path(f"/proc/{pid}").exists()


def test_a_second_sigterm_ends_each_request_with_an_error(tmp_path: Path) -> None:
    with running(tmp_path, engine=["--step-ms", "50"]) as server:
        streams = [Stream(server, 500) for _ in range(3)]
        eventually(lambda: all(s.text for s in streams), what="first texts")
        server.terminate()
        eventually(lambda: server.load()["draining"], 1, "draining")
        server.terminate()
        for stream in streams:
            text = stream.end()
            assert text.count('data: {"error":') == 1
            assert "shutting down" in text
            assert text.endswith("data: [DONE]\n\n")
        assert server.exit_code(5) == 143


def test_the_death_of_the_engine_is_told_to_everybody(tmp_path: Path) -> None:
    with running(tmp_path, engine=["--step-ms", "20", "--max-num-seqs", "1"]) as server:
        begun = Stream(server, 400)
        eventually(lambda: begun.text, what="first text")
        waiting = Stream(server, 400)
        whole: list[httpx.Response] = []
        body = {"prompt": "a b c", "max_tokens": 400}
        thread = threading.Thread(
            target=lambda: whole.append(httpx.post(server.url + TEXT, json=body, timeout=20))
        )
        thread.start()
        eventually(lambda: server.load()["waiting"] == 2, what="two waiting")
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert begun.end().count('data: {"error":') == 1
        assert begun.status == 200
        # Nothing had been sent yet, so these are HTTP errors that clients retry by themselves.
        waiting.end()
        thread.join(20)
        assert waiting.status == whole[0].status_code == 500
        assert whole[0].headers["retry-after"] == "1"
        assert "may be sent again" in whole[0].json()["error"]["message"]
        assert server.exit_code(5) == 70
        assert "killed by SIGKILL" in server.termination_log.read_text()


def test_a_lost_device_ends_the_server_with_its_class(tmp_path: Path) -> None:
    engine = ["--step-ms", "20", "--lose-device-after", "5"]
    with running(tmp_path, engine=engine) as server:
        stream = Stream(server, 400)
        text = stream.end()
        assert text.count('data: {"error":') == 1
        assert "DeviceFailed on an H100" in text
        assert server.exit_code(5) == 70
        assert server.termination_log.read_text() == "DeviceFailed on an H100: Xid 79"


def test_a_start_without_progress_ends(tmp_path: Path) -> None:
    flags = ("--startup-stall-timeout", "1")
    with running(tmp_path, *flags, engine=["--stall-start"], ready=False) as server:
        assert server.exit_code() == 75
        message = server.termination_log.read_text()
        assert "no progress for 1 s in phase weights (25%)" in message
        engine_is_gone(server)


def test_a_retryable_failure_ends_the_server(tmp_path: Path) -> None:
    flags = ["--fail-start", "DeviceLost:retryable"]
    with running(tmp_path, engine=flags, ready=False) as server:
        assert server.exit_code() == 70
        assert "truncated" in server.termination_log.read_text()


def engine_ended(server: ApiServer) -> bool:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return not children.read_text()


def check_failed(server: ApiServer, reason: str, named: str) -> None:
    """A permanent failure: alive, start over, not ready, and it says why everywhere."""
    eventually(lambda: server.load()["state"] == "Failed", what="Failed")
    failure = server.load()["failure"]
    assert (failure["reason"], failure["retryable"]) == (reason, False)
    assert named in failure["message"]
    eventually(lambda: engine_ended(server), what="the engine's end")
    time.sleep(LAST_WORDS_S + 0.05)  # which must not end the server
    assert server.process.poll() is None
    assert [server.status(p) for p in ("/livez", "/startupz", "/readyz")] == [200, 200, 503]
    assert named in server.http.get("/readyz").json()["message"]
    refused = server.http.post(TEXT, json={"prompt": "a"})
    assert refused.status_code == 503
    assert named in refused.json()["error"]["message"]
    server.terminate()
    assert server.exit_code() == 0


def test_a_permanent_failure_of_the_engine_keeps_the_server_up(tmp_path: Path) -> None:
    flags = ["--fail-start", "ModelInvalid:permanent"]
    with running(tmp_path, engine=flags, ready=False) as server:
        check_failed(server, "ModelInvalid", "model.safetensors: truncated")


def test_a_missing_tokenizer_keeps_the_server_up(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    with running(tmp_path, model=folder, ready=False) as server:
        check_failed(server, "ModelInvalid", "tokenizer.json is missing")


def test_the_drain_timeout_holds_with_a_hanging_engine(tmp_path: Path) -> None:
    flags = ["--hang-after", "5"]
    with running(tmp_path, "--drain-timeout", "0.5", engine=flags) as server:
        stream = Stream(server, 100)
        eventually(lambda: stream.text, what="first text")
        server.terminate()
        assert "shutting down" in stream.end()
        assert server.exit_code(8) == 143
        engine_is_gone(server)
