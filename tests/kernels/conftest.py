"""Makes tests/support and these tests importable, and cuts them into shards for slow tools.

OCTAVO_TEST_SHARD=2/8 keeps every eighth test from the third on: first those marked `smallest`, as
they stand, then of the rest, in an order that is the same everywhere and of no meaning, so that a
shard that is stopped by the clock has seen some of everything.
"""

import inspect
import os
import sys
import zlib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Within the capture of a graph nothing may be allocated but from torch's own pool.
        if HERE in item.path.parents and "CUDAGraph" in inspect.getsource(item.function):
            item.add_marker("captures")
    if shard := os.environ.get("OCTAVO_TEST_SHARD"):
        number, count = map(int, shard.split("/"))
        items.sort(
            key=lambda item: (
                0 if item.get_closest_marker("smallest") else zlib.crc32(item.nodeid.encode())
            )
        )
        kept = items[number::count]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    """What a shard is to run, so that whoever reads its output can tell what it did not come to."""
    if "OCTAVO_TEST_SHARD" not in os.environ:
        return []
    return [f"to run: {item.nodeid}" for item in items]
