"""The engine process over real sockets, with a runner that has no model."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from fake_runner import FakeRunner, next_token

from octavo import wire
from octavo.config import EngineConfig
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.engine import process
from octavo.engine.loop import EngineLoop
from octavo.errors import ExitCode
from octavo.params import SamplingParams

HERE = Path(__file__).parent
PATIENCE_S = 10.0


def command(folder, config, runner):
    return [
        *(sys.executable, "-m", "octavo.engine"),
        *("--socket-dir", str(folder), "--config-json", config),
        *("--runner", f"fake_runner:{runner}"),
    ]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}


class Engine:
    """An engine process and the API process's end of its sockets."""

    def __init__(self, folder, config, runner, *, spawn=None):
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PUSH)
        self._requests.bind(f"ipc://{folder}/requests.sock")
        self._events = self._context.socket(zmq.PULL)
        self._events.bind(f"ipc://{folder}/events.sock")
        words = command(folder, config, runner)
        self.process = subprocess.Popen(spawn(words) if spawn else words, env=environment())

    def send(self, *messages):
        for message in messages:
            self._requests.send(wire.encoder.encode(message))

    def receive(self, timeout_s=PATIENCE_S):
        if not self._events.poll(int(timeout_s * 1000)):
            return None
        return wire.to_api_decoder.decode(self._events.recv())

    def until(self, condition):
        """Every message up to the first for which `condition` holds."""
        messages = []
        end = time.monotonic() + PATIENCE_S
        while not messages or not condition(messages[-1]):
            message = self.receive(max(0, end - time.monotonic()))
            assert message is not None, f"nothing more after {messages[-3:]}"
            messages.append(message)
        return messages

    def until_type(self, kind):
        return self.until(lambda message: isinstance(message, kind))

    def finish(self, count):
        """Messages up to the final output of `count` requests."""
        left = count

        def ended(message):
            nonlocal left
            left -= sum(o.finish_reason is not None for o in outputs_of([message]))
            return left <= 0

        return self.until(ended)

    def close(self):
        self.process.kill()
        self.process.wait()
        self._context.destroy(0)


def outputs_of(messages):
    return [o for m in messages if isinstance(m, wire.Outputs) for o in m.outputs]


def tokens_of(messages):
    tokens = {}
    for output in outputs_of(messages):
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.fixture
def start(tmp_path):
    engines = []

    def start(runner="FakeRunner", *, spawn=None, text=None, **config):
        config = text or EngineConfig(**{"model": "m", "num_kv_blocks": 32, **config}).to_json()
        engines.append(Engine(tmp_path, config, runner, spawn=spawn))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(start):
    engine = start()
    engine.until_type(wire.Ready)
    return engine


def request(name, prompt=(5, 6, 7), **params):
    params = {"ignore_eos": True, **params}
    return wire.AddRequest(name, list(prompt), SamplingParams(**params))


def continuation(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, 97))
    return tokens[len(prompt) :]


def test_a_start_is_told_phase_by_phase(start):
    messages = start().until_type(wire.Load)
    progress = [m.phase for m in messages if isinstance(m, wire.Progress)]
    assert list(dict.fromkeys(progress)) == ["import", "check", "weights", "cache", "warmup"]
    ready, load = messages[-2:]
    assert ready == wire.Ready(
        max_model_len=512,
        vocab_size=97,
        block_size=16,
        num_kv_blocks=32,
        max_num_seqs=256,
        device="cpu",
        dtype="float32",
        kv_bytes_per_block=1024,
    )
    assert load.blocks == wire.Blocks(total=32, active=0, shared=0, cached=0, free=32)
    assert load.generation_tokens == 0, "the warm-up is nobody's output"


def test_the_pool_bounds_what_a_request_may_be(start):
    engine = start(num_kv_blocks=4)
    (*_, ready) = engine.until_type(wire.Ready)
    assert ready.max_model_len == 64
    engine.send(request("long", [5] * 64), request("fits", [5] * 63))
    ends = {o.request_id: o for o in outputs_of(engine.finish(2)) if o.finish_reason}
    assert "at most 63" in ends["long"].error
    assert ends["fits"].finish_reason == "length"


def test_by_memory_the_pool_is_what_fits_or_what_the_batch_can_use(start):
    # 0.9 MiB gives 920 blocks beside the null block; 2 sequences of 512 tokens use 64.
    *_, ready = start(num_kv_blocks=None, max_num_seqs=2, enable_prefix_caching=False).until_type(
        wire.Ready
    )
    assert ready.num_kv_blocks == 64
    *_, ready = start(num_kv_blocks=None, max_num_seqs=2).until_type(wire.Ready)
    assert ready.num_kv_blocks == 920


def test_many_at_once_get_what_each_would_get_alone(start):
    engine = start(num_kv_blocks=9, max_model_len=96, max_num_batched_tokens=24, max_num_seqs=8)
    engine.until_type(wire.Ready)
    prompts = {f"r{i}": [(7 * i + j) % 97 for j in range(1 + 5 * i % 37)] for i in range(24)}
    engine.send(*(request(name, prompt, max_tokens=50) for name, prompt in prompts.items()))
    messages = engine.finish(24)
    assert tokens_of(messages) == {n: continuation(p, 50) for n, p in prompts.items()}
    load = engine.until_type(wire.Load)[-1]
    while load.running or load.waiting:
        load = engine.until_type(wire.Load)[-1]
    assert load.preemptions > 0, "the test means more with preemptions"
    assert load.blocks.free + load.blocks.cached == 9


def test_a_bad_request_and_an_abort_disturb_nobody(engine):
    engine.send(
        request("good", max_tokens=40),
        request("bad", [97]),
        request("gone", max_tokens=400),
        wire.AbortRequest("gone"),
        wire.AbortRequest("never there"),
    )
    messages = engine.finish(3)
    ends = {o.request_id: o.finish_reason for o in outputs_of(messages) if o.finish_reason}
    assert ends == {"good": "length", "bad": "error", "gone": "abort"}
    assert tokens_of(messages)["good"] == continuation((5, 6, 7), 40)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_engine_sleeps_and_reports_each_second(engine):
    engine.until_type(wire.Load)
    before, begin = cpu_seconds(engine.process.pid), time.monotonic()
    assert isinstance(engine.receive(), wire.Load)
    assert isinstance(engine.receive(), wire.Load)
    assert 1.7 < time.monotonic() - begin < 3
    assert cpu_seconds(engine.process.pid) - before < 0.1


def test_a_busy_engine_reports_often_and_at_once_when_it_is_idle_again(start):
    engine = start("SlowRunner")
    engine.until_type(wire.Ready)
    engine.until_type(wire.Load)
    engine.send(request("a", max_tokens=40))
    begin = time.monotonic()
    messages = engine.finish(1)
    seconds = time.monotonic() - begin
    loads = [m for m in messages if isinstance(m, wire.Load)]
    assert 0.4 * seconds / 0.05 <= len(loads) <= seconds / 0.05 + 1
    assert all(load.running == 1 for load in loads[1:])
    end = time.monotonic()
    last = engine.until_type(wire.Load)[-1]
    assert time.monotonic() - end < 0.5
    assert (last.running, last.blocks.active) == (0, 0)


def test_sigterm_is_for_the_api_process_and_stop_ends_what_is_left(engine):
    engine.send(request("a", max_tokens=500))
    engine.until_type(wire.Outputs)
    engine.process.send_signal(signal.SIGTERM)
    engine.process.send_signal(signal.SIGINT)
    engine.until_type(wire.Outputs)
    engine.send(request("b", max_tokens=500), wire.Stop())
    ends = {o.request_id: o.finish_reason for o in outputs_of(engine.finish(2)) if o.finish_reason}
    assert ends["b"] == "abort"
    assert ends["a"] in ("abort", "length")
    assert engine.process.wait(5) == ExitCode.OK


FAILURES = [
    ("invalid_model", {}, ("ModelInvalid", False), "m/config.json: not a model", ExitCode.CONFIG),
    ("retryable_failure", {}, ("InternalError", True), "m/config.json", ExitCode.FAILED),
    ("no_such_runner", {}, ("EngineFailed", True), "AttributeError", ExitCode.FAILED),
    (
        "FakeRunner",
        {"source": "hub", "model": "../m"},
        ("ConfigInvalid", False),
        "'../m' is no model of a hub",
        ExitCode.CONFIG,
    ),
    ("FakeRunner", {"text": '{"model":1}'}, ("ConfigInvalid", False), "model", ExitCode.CONFIG),
    (
        "FakeRunner",
        {"num_kv_blocks": 5000},
        ("ModelDoesNotFit", False),
        "--num-kv-blocks 5000 needs 4 MiB and 1 MiB are free; at most 1023 fit",
        ExitCode.CONFIG,
    ),
    (
        "FakeRunner",
        {"num_kv_blocks": None, "gpu_memory_utilization": 0.01},
        ("ModelDoesNotFit", False),
        "set --max-model-len to at most 144",
        ExitCode.CONFIG,
    ),
    (
        "FakeRunner",
        {"num_kv_blocks": 1, "block_size": 1},
        ("ConfigInvalid", False),
        "no request",
        78,
    ),
]


@pytest.mark.parametrize(("runner", "config", "failure", "text", "code"), FAILURES)
def test_a_start_that_fails_says_why_and_whether_trying_again_helps(
    start, runner, config, failure, text, code
):
    engine = start(runner, **config)
    failed = engine.until_type(wire.Failed)[-1]
    assert (failed.reason, failed.retryable) == failure
    assert text in failed.message
    assert engine.process.wait(5) == code


def test_a_runner_that_breaks_is_the_end_of_the_process(start):
    engine = start("BrokenRunner")
    engine.until_type(wire.Ready)
    engine.send(request("a", max_tokens=50))
    failed = engine.until_type(wire.Failed)[-1]
    assert (failed.reason, failed.retryable) == ("EngineFailed", True)
    assert failed.message == "RuntimeError: device fell off the bus"
    assert engine.process.wait(5) == ExitCode.FAILED


def test_a_lost_device_ends_the_process_without_waiting_for_it(start):
    engine = start("LostDeviceRunner")
    engine.until_type(wire.Ready)
    engine.send(request("a", max_tokens=50))
    failed = engine.until_type(wire.Failed)[-1]
    assert (failed.reason, failed.message) == ("DeviceFailed", "it fell off the bus")
    assert failed.retryable
    assert engine.process.wait(5) == ExitCode.FAILED


def test_idle_moments_prepare_for_steps_to_come(start):
    engine = start("PreparingRunner")
    engine.until_type(wire.Ready)
    engine.until(lambda message: isinstance(message, wire.Progress) and message.phase == "3")
    engine.send(request("a", max_tokens=5))
    engine.finish(1)
    engine.send(wire.Stop())
    assert engine.process.wait(5) == ExitCode.OK


class Script:
    """A link whose messages come one by one; it notes what the server was doing."""

    def __init__(self, *messages):
        self.messages = list(messages)
        self.checking = []

    def receive(self, timeout_s):
        self.checking.append(self.server._audit is not None)
        message = self.messages.pop(0)
        if message is not None and self.checking[-1]:
            process.IDLE_LOAD_S = 1e9  # no other check begins
        return [] if message is None else [message]

    def send(self, message):
        pass


def test_a_check_in_turns_is_given_up_when_a_request_comes(monkeypatch):
    """What was counted before a request is not true after it."""
    monkeypatch.setattr(process, "IDLE_LOAD_S", 0.0)
    limits = Limits(
        block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, vocab_size=97,
        eos_token_ids=frozenset(),
    )  # fmt: skip
    runner = FakeRunner(
        "", device="cpu", dtype="", max_model_len=64, block_size=4, progress=lambda *_: None
    )
    runner.allocate_kv(20_001)
    scheduler = Scheduler(BlockPool(20_000), PolicyFactory.get_policy("fcfs"), limits)
    first, second = (
        wire.AddRequest(name, [5] * 9, SamplingParams(max_tokens=1)) for name in ("a", "b")
    )
    link = Script(first, None, None, None, second, None, None, wire.Stop())
    link.server = process.Server(EngineLoop(scheduler, runner), link, os.getppid())
    link.server.run()
    assert sum(1 for _ in scheduler.audit()) > 8, "or it is over before the second request comes"
    assert link.checking == [False, True, True, True, True, False, False, False]


def test_a_lost_block_is_found_when_the_engine_is_idle(start):
    engine = start("LeakyRunner")
    engine.until_type(wire.Ready)
    engine.send(request("a", max_tokens=5))
    failed = engine.until_type(wire.Failed)[-1]
    assert failed.message.startswith("IntegrityError: block ")
    assert engine.process.wait(5) == ExitCode.FAILED


def test_the_engine_dies_with_its_parent(start):
    script = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid); p.wait()"
    engine = start(spawn=lambda words: [sys.executable, "-c", script, *words])
    engine.until_type(wire.Ready)
    children = Path(f"/proc/{engine.process.pid}/task/{engine.process.pid}/children")
    child = int(children.read_text())
    engine.process.kill()
    end = time.monotonic() + 5
    while running(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not running(child)


def test_the_collector_rests_during_the_start_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(process, "start", lambda *_: seen.append(gc.isenabled()) or (None, "ready"))
    server = type(
        "Server", (), {"run": lambda _: seen.append((gc.isenabled(), gc.get_freeze_count()))}
    )
    monkeypatch.setattr(process, "Server", lambda *_: server())
    try:
        process._serve(EngineConfig(model="m").to_json(), "", Script(), os.getpid())
    finally:
        gc.unfreeze()
    assert seen[0] is False
    enabled, frozen = seen[1]
    assert enabled
    assert frozen > 1000


def test_a_parent_that_died_before_it_could_be_followed_is_noticed(tmp_path):
    words = [*command(tmp_path, EngineConfig(model="m").to_json(), "FakeRunner"), "--parent", "1"]
    run = subprocess.run(words, env=environment(), timeout=PATIENCE_S, check=False)
    assert run.returncode == ExitCode.FAILED


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_heavy_is_imported_before_the_first_message():
    code = (
        "import sys, octavo.engine.process; "
        "print(sorted({'torch', 'numpy', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert run.stdout.strip() == "[]"
