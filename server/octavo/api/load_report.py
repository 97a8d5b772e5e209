"""`GET /octavo/load`: the contract with the operator, built from the last message of the engine."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.api.lifecycle import Lifecycle, State

SCHEMA = 1
STALE_AFTER_S = 5.0


def load_report(lifecycle: Lifecycle, in_flight: int) -> dict[str, Any]:
    """The report's JSON object. `in_flight` counts requests sent to the engine and not finished.

    Requests that the engine has not yet seen count as waiting, so that a burst shows at once.
    """
    report: dict[str, Any] = {"schema": SCHEMA, "state": lifecycle.state.value}
    if lifecycle.state is State.STARTING:
        report["progress"] = progress_report(lifecycle)
    if lifecycle.failure is not None and lifecycle.state is State.FAILED:
        report["failure"] = failure_report(lifecycle)
    report |= _scheduler_part(lifecycle, in_flight)
    report["draining"] = lifecycle.state is State.DRAINING
    if lifecycle.has_work and lifecycle.load_age() > STALE_AFTER_S:
        report["stale_s"] = round(lifecycle.load_age(), 1)
    return report


def progress_report(lifecycle: Lifecycle) -> dict[str, Any]:
    """How far the start has come."""
    progress = lifecycle.progress
    return {"phase": progress.phase, "ratio": progress.ratio, "eta_s": progress.eta_s}


def failure_report(lifecycle: Lifecycle) -> dict[str, Any]:
    """Why the server cannot serve."""
    failure = lifecycle.failure
    if failure is None:
        return {}
    return {"reason": failure.reason, "message": failure.message, "retryable": failure.retryable}


def _scheduler_part(lifecycle: Lifecycle, in_flight: int) -> dict[str, Any]:
    load = lifecycle.load
    if load is None:
        return {
            "blocks": None,
            "block_size": lifecycle.engine.block_size if lifecycle.engine else None,
            "block_bytes": _block_bytes(lifecycle),
            "kv_utilization": 0.0,
            "demand_blocks": None,
            "seconds_to_exhaustion": None,
            "running": 0,
            "waiting": in_flight,
            "waiting_blocks": 0,
            "prefill_backlog_s": 0.0,
            "step_budget_used": 0.0,
            "preemptions": 0,
            "last_activity": None,
        }
    unseen = max(0, in_flight - load.running - load.waiting)
    return {
        "blocks": msgspec.to_builtins(load.blocks),
        "block_size": load.block_size,
        "block_bytes": _block_bytes(lifecycle),
        "kv_utilization": load.kv_utilization,
        "demand_blocks": load.demand_blocks,
        "seconds_to_exhaustion": load.seconds_to_exhaustion,
        "running": load.running,
        "waiting": load.waiting + unseen,
        "waiting_blocks": load.waiting_blocks,
        "prefill_backlog_s": load.prefill_backlog_s,
        "step_budget_used": load.step_budget_used,
        "preemptions": load.preemptions,
        "last_activity": load.last_activity,
    }


def _block_bytes(lifecycle: Lifecycle) -> int | None:
    return lifecycle.engine.kv_bytes_per_block if lifecycle.engine else None
