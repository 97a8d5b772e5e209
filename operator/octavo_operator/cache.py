"""The operator's memory of the cluster: raw objects by kind, fed by events, writes and reads."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from octavo_operator.observed import Raw
from octavo_operator.resources import SERVICE_LABEL
from octavo_operator.spec import KIND

Key = tuple[str, str]


def key_of(raw: Raw) -> Key:
    """Namespace and name of an object."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def owner_of(raw: Raw) -> Key | None:
    """Namespace and name of the service that a child belongs to, by its label."""
    name = (raw["metadata"].get("labels") or {}).get(SERVICE_LABEL)
    return (raw["metadata"]["namespace"], name) if name else None


class Cache:
    """Latest known objects. An older version never replaces a newer one of the same object."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[Key, Raw]] = defaultdict(dict)
        self._uids: dict[str, Key] = {}
        self._pods: dict[Key, set[Key]] = defaultdict(set)

    def put(self, kind: str, raw: Raw) -> None:
        """Remember an object unless a newer version is known."""
        key = key_of(raw)
        known = self._objects[kind].get(key)
        if known and _newer(known, raw):
            return
        if known:
            self._unindex(kind, key, known)
        meta = {k: v for k, v in raw["metadata"].items() if k != "managedFields"}
        self._objects[kind][key] = {**raw, "metadata": meta}
        self._index(kind, key, raw)

    def remove(self, kind: str, raw: Raw) -> None:
        """Forget an object; a newer object of the same name stays."""
        key = key_of(raw)
        known = self._objects[kind].get(key)
        if known and known["metadata"]["uid"] == raw["metadata"]["uid"]:
            self.forget(kind, key)

    def forget(self, kind: str, key: Key) -> None:
        """Forget whatever has this name."""
        known = self._objects[kind].pop(key, None)
        if known:
            self._unindex(kind, key, known)

    def get(self, kind: str, key: Key) -> Raw | None:
        """The object of this kind and name."""
        return self._objects[kind].get(key)

    def service(self, uid: str) -> Raw | None:
        """The LLMService with this UID."""
        key = self._uids.get(uid)
        return self._objects[KIND].get(key) if key else None

    def service_uid(self, key: Key | None) -> str | None:
        """The UID of the LLMService of this name."""
        raw = self._objects[KIND].get(key) if key else None
        uid: str | None = raw["metadata"]["uid"] if raw else None
        return uid

    def pods(self, key: Key) -> list[Raw]:
        """The pods of the LLMService of this name, in the order of their names."""
        return [self._objects["Pod"][pod] for pod in sorted(self._pods.get(key, ()))]

    def size(self) -> dict[str, int]:
        """How many objects of each kind are remembered."""
        return {kind: len(objects) for kind, objects in self._objects.items()}

    def _index(self, kind: str, key: Key, raw: Raw) -> None:
        owner = owner_of(raw)
        if kind == KIND:
            self._uids[raw["metadata"]["uid"]] = key
        elif kind == "Pod" and owner:
            self._pods[owner].add(key)

    def _unindex(self, kind: str, key: Key, raw: Raw) -> None:
        owner = owner_of(raw)
        if kind == KIND:
            self._uids.pop(raw["metadata"]["uid"], None)
        elif kind == "Pod" and owner:
            self._pods[owner].discard(key)
            if not self._pods[owner]:
                del self._pods[owner]


def _newer(known: Raw, raw: Raw) -> bool:
    """Whether what is known is a later version of the same object."""
    old: dict[str, Any] = known["metadata"]
    new: dict[str, Any] = raw["metadata"]
    if old["uid"] != new["uid"]:
        return False
    versions = old.get("resourceVersion", ""), new.get("resourceVersion", "")
    return all(v.isdigit() for v in versions) and int(versions[0]) > int(versions[1])
