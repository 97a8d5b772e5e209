"""Makes tests/support and these tests importable, and cuts them into shards for slow tools.

OCTAVO_TEST_SHARD=2/8 keeps every eighth test from the third on: first those marked `smallest`, as
they stand, then of the rest one of each function, a second of each, and so on, each time in an
order that is the same everywhere and of no meaning, so that a shard that is stopped by the clock
has seen some of everything. 2/8+5 goes on behind the fifth of these. OCTAVO_TEST_RELEASING_LANES
is `_cuda.set_releasing_lanes`'s argument.
"""

import inspect
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE)]


def pytest_configure() -> None:
    if lanes := os.environ.get("OCTAVO_TEST_RELEASING_LANES"):
        from octavo_kernels import _cuda

        _cuda.set_releasing_lanes(int(lanes))


def pytest_itemcollected(item: pytest.Item) -> None:
    # Within the capture of a graph nothing may be allocated but from torch's own pool.
    if "CUDAGraph" in inspect.getsource(item.function):
        item.add_marker("captures")


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := os.environ.get("OCTAVO_TEST_SHARD"):
        number, count, begin = (int(n) for n in re.split(r"[/+]", f"{shard}+0")[:3])
        kept = in_turns(items)[number::count][begin:]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def in_turns(items: list[pytest.Item]) -> list[pytest.Item]:
    first, rest = [], []
    for item in items:
        (first if item.get_closest_marker("smallest") else rest).append(item)
    rest.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    seen: Counter[object] = Counter()
    turns = {}
    for item in rest:
        turns[item] = seen[item.function]
        seen[item.function] += 1
    return [*first, *sorted(rest, key=turns.__getitem__)]


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    """What a shard is to run, so that whoever reads its output can tell what it did not come to."""
    if "OCTAVO_TEST_SHARD" not in os.environ:
        return []
    return [f"to run: {item.nodeid}" for item in items]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """How long a test took, at once: a shard that is stopped has no summary."""
    if "OCTAVO_TEST_SHARD" not in os.environ or report.when != "call" or not report.passed:
        return None
    return "passed", ".", f"PASSED in {report.duration:.1f} s"
