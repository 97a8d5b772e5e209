"""Does a live object still have what was applied? Pure; the API server's own defaults are ignored.

The manifests carry a hash of themselves in an annotation, so a field that left the manifest shows
as a difference too, and a comparison of the manifest's own fields is enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# Items of these lists are found by a key, because others (an injected sidecar) may add items.
_ITEM_KEYS = ("name", "mountPath", "uid", "topologyKey")
_QUANTITY = re.compile(r"([0-9.]+)([A-Za-z]*)")
_SUFFIXES = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{suffix: Decimal(1000) ** (i + 1) for i, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Decimal(1024) ** (i + 1) for i, suffix in enumerate("KMGTPE")},
}
_QUANTITY_PARENTS = (".requests.", ".limits.", ".sizeLimit")


def first_difference(applied: Any, live: Any, path: str = "") -> str | None:
    """Path of the first field that differs from what was applied; None when nothing does."""
    if isinstance(applied, Mapping):
        return _mapping_difference(applied, live, path)
    if isinstance(applied, list):
        return _list_difference(applied, live, path)
    if applied == live:
        return None
    if any(parent in path for parent in _QUANTITY_PARENTS) and _same_quantity(applied, live):
        return None
    return path


def _mapping_difference(applied: Mapping[str, Any], live: Any, path: str) -> str | None:
    if not isinstance(live, Mapping):
        # The server leaves out what is empty.
        return path if applied else None
    for key, value in applied.items():
        if found := first_difference(value, live.get(key), f"{path}.{key}"):
            return found
    return None


def _list_difference(applied: list[Any], live: Any, path: str) -> str | None:
    if not isinstance(live, list):
        return path if applied else None
    key = _item_key(applied)
    if key is None:
        if len(applied) != len(live):
            return path
        pairs = list(zip(applied, live, strict=True))
    else:
        by_key = {item.get(key): item for item in live if isinstance(item, Mapping)}
        pairs = [(item, by_key.get(item[key])) for item in applied]
    for index, (item, found) in enumerate(pairs):
        if difference := first_difference(item, found, f"{path}[{index}]"):
            return difference
    return None


def _item_key(items: list[Any]) -> str | None:
    for key in _ITEM_KEYS:
        if items and all(isinstance(item, Mapping) and key in item for item in items):
            return key
    return None


def _same_quantity(one: Any, other: Any) -> bool:
    """1024Mi is 1Gi and 0.5 is 500m: the API server rewrites quantities."""
    first, second = _quantity(one), _quantity(other)
    return first is not None and first == second


def _quantity(value: Any) -> Decimal | None:
    match = _QUANTITY.fullmatch(str(value))
    if not match or match[2] not in _SUFFIXES:
        return None
    return Decimal(match[1]) * _SUFFIXES[match[2]]
