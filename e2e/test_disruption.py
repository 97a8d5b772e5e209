"""Pods die, configurations roll, accelerators run out: what a user sees of it."""

from __future__ import annotations

import json

import pytest

from deployments import Bench, manifest
from kube import Json, is_ready, wait_until
from load import Load
from tinymodel import tasks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

COUNTS = [tasks.count_task(a, a + 40) for a in range(100, 160, 5)]
SUM = tasks.sum_task(17, 25)


def ask(bench: Bench, name: str) -> None:
    """One right answer."""
    tally = Load(bench.url(name), name, [SUM], clients=1, max_requests=2).start().wait()
    assert tally.right == 2, tally


def test_a_killed_pod_is_replaced(bench: Bench) -> None:
    name = bench.serve(manifest("mortal", replicas=1))
    (old,) = bench.pods(name)
    bench.cluster.kubectl(
        *("delete", "pod", old["metadata"]["name"], "--namespace", bench.namespace),
        *("--grace-period=0", "--force"),
    )

    def replaced() -> bool:
        found = bench.ready_pods(name)
        return len(found) == 1 and found[0]["metadata"]["uid"] != old["metadata"]["uid"]

    wait_until(replaced, "a new pod is ready", timeout=60)
    bench.wait_ready(name)
    ask(bench, name)
    bench.delete(name)


def test_a_dead_engine_process_is_started_again(bench: Bench) -> None:
    """The engine is killed inside the pod: the container ends, says why, and comes back."""
    name = bench.serve(manifest("engine", replicas=1))
    (pod,) = bench.pods(name)
    bench.cluster.kubectl(
        *("exec", pod["metadata"]["name"], "--namespace", bench.namespace, "--"),
        *("python3", "-c", KILL_ENGINE),
    )

    def back() -> Json | None:
        (found,) = bench.pods(name)
        (status,) = found["status"]["containerStatuses"]
        return status if status["restartCount"] == 1 and is_ready(found) else None

    status = wait_until(back, "the container was started again", timeout=90)
    ended = status["lastState"]["terminated"]
    assert ended["exitCode"] == 70
    assert "engine" in ended["message"].lower()
    bench.wait_ready(name)
    ask(bench, name)
    bench.delete(name)


# The engine is the child of the API process (1) that is not a helper of multiprocessing.
KILL_ENGINE = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*"):
    words = (path / "cmdline").read_bytes().split(b"\\0")
    if any(b"octavo.engine" in word for word in words):
        os.kill(int(path.name), signal.SIGKILL)
        break
else:
    raise SystemExit("no engine process")
"""


def test_a_rolling_change_under_load_loses_no_request(bench: Bench) -> None:
    name = bench.serve(manifest("rolling", replicas=1))
    (old,) = bench.pods(name)
    load = Load(bench.url(name), name, COUNTS, clients=4).start()
    try:
        wait_until(lambda: load.tally.right >= 4, "the load runs", timeout=30)
        bench.patch(name, {"engine": {"maxNumSeqs": 32}})
        wait_until(lambda: bench.settled(name), "the change is rolled out", timeout=120)
        before = load.tally.right
        wait_until(lambda: load.tally.right >= before + 4, "the new pod answers", timeout=30)
    finally:
        tally = load.stop()
    assert (tally.failed, tally.wrong) == (0, 0), tally
    (new,) = bench.pods(name)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert "--max-num-seqs" in json.dumps(new["spec"])
    bench.delete(name)


def test_accelerators_are_asked_for_and_their_lack_is_told(bench: Bench, gpus: int) -> None:
    """One GPU, two replicas: one runs on it, and the condition says what the other waits for."""
    spec = manifest("gpu", replicas=2, accelerator={"count": gpus})
    spec["spec"]["engine"]["device"] = (
        "auto"  # there is no GPU to be found, so it serves on the CPU
    )
    name = bench.apply(spec)

    def split() -> bool:
        phases = sorted(pod["status"]["phase"] for pod in bench.pods(name))
        return phases == ["Pending", "Running"] and len(bench.ready_pods(name)) == 1

    wait_until(split, "one pod runs and one is pending", timeout=90)
    for pod in bench.pods(name):
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == str(gpus)
        assert resources["requests"]["nvidia.com/gpu"] == str(gpus)

    def told() -> bool:
        ready = bench.condition(name, "Ready")
        return "Insufficient nvidia.com/gpu" in ready.get("message", "")

    wait_until(told, "a Ready condition that names the missing GPU", timeout=30)
    assert bench.condition(name, "Ready")["status"] == "False"
    ask(bench, name)
    bench.patch(name, {"replicas": 1})
    bench.wait_ready(name)
    bench.delete(name)
