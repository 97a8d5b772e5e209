"""The whole loop: a cluster, the chart, a model, an answer, 1 → 3 → 1 replicas, in one command.

    .venv/bin/python e2e/demo.py

Prints each step with its time, writes benchmarks/results/demo.json, and exits non-zero when any
part of it did not happen. The cluster is left running.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster_access import bring_up, build_images, connect
from deployments import (
    CLIENTS,
    COUNTS,
    DEMO_NAMESPACE,
    DEMO_RELEASE,
    DEMO_SYSTEM_NAMESPACE,
    SHORT_WINDOWS,
    SMALL_POOL,
    Bench,
    make_room,
)
from kube import ROOT, ClusterError, wait_until
from load import Load, RequestFailedError, Tally, stream_answer
from scaling import ScaleWatch, Story
from tinymodel import tasks

NAME = "tiny"
EXAMPLE = ROOT / "docs" / "examples" / "llmservice.yaml"
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
LOW, HIGH = 1, 3
LIMITS = {
    "apply_to_first_token_s": 45.0,
    "pressure_to_decision_s": 5.0,
    "decision_to_ready_s": 30.0,
}
QUESTION = tasks.sum_task(17, 25)

HOLD_S = 8.0


class Steps:
    """Named steps, each printed with the seconds it took."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; a step that raises is recorded as failed."""
        print(f"\n▶ {name}", flush=True)
        began = time.monotonic()
        row: dict[str, Any] = {"step": name, "ok": False}
        self.rows.append(row)
        try:
            yield
            row["ok"] = True
        finally:
            row["seconds"] = round(time.monotonic() - began, 1)
            print(f"  {'done in' if row['ok'] else 'FAILED after'} {row['seconds']} s", flush=True)

    def say(self, line: str) -> None:
        """A line inside a step, with the time since the beginning."""
        print(f"  {time.monotonic() - self.began:6.1f} s  {line}", flush=True)


def machine() -> dict[str, Any]:
    """What this ran on."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "kernel": platform.release(),
    }


def commit() -> str:
    """The commit that ran, marked when the tree has other contents."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return shown.stdout.strip() or "unknown"


def first_answer(bench: Bench) -> tuple[str, float]:
    """Ask through the Service; the answer printed as it comes, and when its first part came."""
    print(f"  {QUESTION.messages[-1]['content']}  ", end="", flush=True)
    answer, first = "", 0.0
    for part in stream_answer(bench.url(NAME), NAME, QUESTION):
        first = first or time.monotonic()
        answer += part
        print(part, end="", flush=True)
    print(flush=True)
    if not tasks.check(QUESTION, answer):
        raise ClusterError(f"the answer is {answer!r}, {QUESTION.expected!r} is right")
    return answer, first


def apply_and_ask(bench: Bench, steps: Steps, result: dict[str, Any]) -> None:
    """Apply the example, wait for Ready, ask: the way of a user, with a clock beside it."""
    with steps.step("apply docs/examples/llmservice.yaml and wait for Ready"):
        bench.close()  # what an earlier demo left
        bench.cluster.ensure_namespace(DEMO_NAMESPACE)
        began = time.monotonic()
        bench.cluster.kubectl("apply", "--namespace", DEMO_NAMESPACE, "-f", str(EXAMPLE))
        bench.wait_ready(NAME, timeout=300)
        show(bench, steps)
    with steps.step("ask through the Service, streamed"):
        answer, first = first_answer(bench)
    result["question"] = QUESTION.messages[-1]["content"]
    result["answer"] = answer
    result["apply_to_first_token_s"] = round(first - began, 2)


def shrink(bench: Bench) -> None:
    """Patch a small pool and short windows in, and wait until just that runs.

    The pool is so small that its blocks run out long before two cores do. The example file keeps
    the defaults that production wants.
    """
    bench.patch(NAME, {"engine": SMALL_POOL, "autoscaling": SHORT_WINDOWS})
    wait_until(lambda: bench.settled(NAME, LOW), "the small pool is rolled out", timeout=180)
    (pod,) = bench.pods(NAME)
    load = bench.cluster.load(DEMO_NAMESPACE, pod["metadata"]["name"]) or {}
    if (load.get("blocks") or {}).get("total") != SMALL_POOL["numKvBlocks"]:
        raise ClusterError(f"the pool is not the small one: {load}")


def scale(bench: Bench, steps: Steps) -> tuple[Story, Tally]:
    """Press until there are HIGH replicas, let go until there is LOW again."""

    def say(line: str) -> None:
        steps.say(line)
        if line.startswith("ready"):
            show(bench, steps)

    load = Load(bench.url(NAME), NAME, COUNTS, clients=CLIENTS)
    watch = ScaleWatch(bench.cluster, DEMO_NAMESPACE, NAME, say).start()
    try:
        with steps.step(f"load of {CLIENTS} clients: {LOW} → {HIGH} replicas"):
            load.start()
            wait_until(
                lambda: watch.error or len(bench.ready_pods(NAME)) == HIGH,
                f"{HIGH} ready replicas under load",
                timeout=120,
            )
            time.sleep(HOLD_S)  # all of them serve for a while
            load.stop()
            steps.say(f"requests: {load.tally.as_json()}")
        with steps.step(f"no load: {HIGH} → {LOW} replica"):
            wait_until(
                lambda: watch.error or len(bench.pods(NAME)) == LOW,
                f"back to {LOW} replica",
                timeout=180,
            )
            time.sleep(1)  # the watch's last look
    finally:
        tally = load.stop()
        story = watch.stop()
    return story, tally


def show(bench: Bench, steps: Steps) -> None:
    """What a user sees."""
    for line in bench.cluster.kubectl("get", "llmsvc", "--namespace", DEMO_NAMESPACE).splitlines():
        steps.say(f"    {line}")


def verdict(result: dict[str, Any], story: Story, tally: Tally) -> list[str]:
    """Why this run is not good enough; nothing when it is."""
    wrong = []
    if not story.rose_and_fell(LOW, HIGH):
        wrong.append(f"replicas went {story.ready_counts}, not from {LOW} to {HIGH} and back")
    if tally.failed or tally.wrong or not tally.right:
        wrong.append(f"requests: {tally.as_json()}")
    for name, limit in LIMITS.items():
        if result[name] is None or result[name] > limit:
            wrong.append(f"{name} is {result[name]}, the limit is {limit:g}")
    return wrong


def go_on(bench: Bench) -> None:
    """Print how to use what is now running."""
    cluster = bench.cluster
    print(f"""
It is yours:
  export KUBECONFIG={cluster.kubeconfig or "(your current context)"}
  {cluster.kubectl_path} get llmsvc,pods --namespace {DEMO_NAMESPACE}
  curl -s {bench.url(NAME)}/v1/chat/completions \\
    -H 'content-type: application/json' \\
    -d '{{"model": "{NAME}", "messages": [{{"role": "user", "content": "Spell the word river."}}]}}'
End it with:
  make demo-down""")


def run_demo(steps: Steps, result: dict[str, Any]) -> list[str]:
    """Every step in order; the reasons why it is not good enough."""
    with steps.step("cluster up"):
        bring_up()
    with steps.step("images built and pushed"):
        build_images()
    cluster = connect()
    result["kubernetes"] = (cluster.get("/version") or {}).get("gitVersion")
    try:
        with steps.step("chart installed, operator running"):
            make_room(cluster, DEMO_RELEASE)
            cluster.install_chart(DEMO_RELEASE, DEMO_SYSTEM_NAMESPACE)
        bench = Bench(cluster, DEMO_NAMESPACE)
        apply_and_ask(bench, steps, result)
        with steps.step("small block pool and short windows, for the sake of watching"):
            shrink(bench)
        story, tally = scale(bench, steps)
        pressure, ready = story.pressure_to_decision(), story.decision_to_ready()
        result["replicas_seen"] = story.ready_counts
        result["decisions"] = [f"{d.before} → {d.after}: {d.reason}" for d in story.decisions]
        result["requests"] = tally.as_json()
        result["pressure_to_decision_s"] = None if pressure is None else round(pressure, 2)
        result["decision_to_ready_s"] = None if ready is None else round(ready, 2)
        wrong = verdict(result, story, tally)
        if not wrong:
            go_on(bench)
        return wrong
    finally:
        cluster.close()


def main() -> int:
    """Exit 0 only when all of it happened."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    steps = Steps()
    result: dict[str, Any] = {
        "command": "make demo",
        "commit": commit(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "limits": LIMITS,
    }
    try:
        wrong = run_demo(steps, result)
    except (ClusterError, RequestFailedError, OSError) as error:
        wrong = [str(error)]
    result["steps"] = steps.rows
    result["seconds"] = round(time.monotonic() - steps.began, 1)
    result["ok"] = not wrong
    result["wrong"] = wrong
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("\nsteps:")
    for row in steps.rows:
        print(f"  {row['seconds']:7.1f} s  {row['step']}")
    for name, limit in LIMITS.items():
        print(f"  {name}: {result.get(name)} (limit {limit:g})")
    for line in wrong:
        print(f"NOT DONE: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
