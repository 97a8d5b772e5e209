"""Replicas follow the pressure on the KV cache, and no request pays for it."""

from __future__ import annotations

import time

import pytest

from deployments import (
    CLIENTS,
    COUNTS,
    SHORT_WINDOWS,
    SMALL_POOL,
    Bench,
    keep_looking,
    manifest,
    restart_operator,
)
from kube import alive, wait_until
from load import Load, stream_answer
from scaling import ScaleWatch
from tinymodel import tasks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture
def elastic(bench: Bench, request: pytest.FixtureRequest) -> str:
    """A service of one to three replicas with a pool that is soon full."""
    name = f"elastic-{request.node.name.rsplit('_', 1)[-1]}"
    bench.serve(manifest(name, engine=SMALL_POOL, autoscaling={"max": 3, **SHORT_WINDOWS}))
    return name


def test_from_apply_to_the_first_token(bench: Bench) -> None:
    """With the image on the node: at most 45 s from `kubectl apply` to a token."""
    began = time.monotonic()
    name = bench.serve(manifest("first", replicas=1))
    first = next(stream_answer(bench.url(name), name, tasks.sum_task(17, 25)))
    took = time.monotonic() - began
    assert first
    print(f"apply to first token: {took:.1f} s")
    assert took <= 45
    bench.delete(name)


def test_replicas_rise_under_load_and_fall(bench: Bench, elastic: str) -> None:
    """1 → 3 → 1, every answer right, no request failed, and quickly enough.

    A few clients go on while the replicas go: what leaves must not take a request with it.
    """
    watch = ScaleWatch(bench.cluster, bench.namespace, elastic).start()
    load = Load(bench.url(elastic), elastic, COUNTS, clients=CLIENTS).start()
    try:
        wait_until(lambda: len(bench.ready_pods(elastic)) == 3, "3 ready replicas", timeout=90)
        time.sleep(5)
        rest = Load(bench.url(elastic), elastic, COUNTS[:3], clients=2).start()
        load.stop()
        try:
            wait_until(lambda: len(bench.pods(elastic)) == 1, "back to one replica", timeout=120)
            time.sleep(1)  # the watch's last look
        finally:
            rest.stop()
    finally:
        load.stop()
        story = watch.stop()
    for tally in (load.tally, rest.tally):
        print(tally)
        assert (tally.failed, tally.wrong) == (0, 0), tally
        assert tally.right == tally.sent > 0
    assert story.rose_and_fell(1, 3), story.ready_counts
    assert all(decision.reason for decision in story.decisions)
    decided, ready = story.pressure_to_decision(), story.decision_to_ready()
    print(f"pressure to decision: {decided} s, decision to ready: {ready} s")
    assert decided is not None
    assert decided <= 5
    assert ready is not None
    assert ready <= 30
    events = bench.cluster.kubectl(
        *("get", "events", "--namespace", bench.namespace, "--output=name"),
        *("--field-selector", f"involvedObject.name={elastic},reason=ScaledUp"),
    )
    assert events.strip(), "no ScaledUp event"
    bench.delete(elastic)


def test_replicas_hold_while_the_operator_restarts(bench: Bench, elastic: str) -> None:
    """The operator dies under load: no replica goes, no request fails, and it goes on."""
    load = Load(bench.url(elastic), elastic, COUNTS, clients=CLIENTS).start()
    try:
        wait_until(lambda: len(bench.ready_pods(elastic)) == 3, "3 ready replicas", timeout=90)
        before = {pod["metadata"]["uid"] for pod in bench.pods(elastic)}
        restart_operator(bench.cluster)
        seen = keep_looking(lambda: {p["metadata"]["uid"] for p in alive(bench.pods(elastic))}, 10)
        assert all(pods == before for pods in seen)
    finally:
        tally = load.stop()
    assert (tally.failed, tally.wrong) == (0, 0), tally
    wait_until(lambda: len(bench.pods(elastic)) == 1, "back to one replica", timeout=120)
    bench.delete(elastic)
