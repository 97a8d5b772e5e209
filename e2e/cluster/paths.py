"""Where things lie: caches that all checkouts share, and the state of the one cluster.

The cache belongs to a user and outlives everything. The cluster's state belongs to the machine,
because its bridge, addresses and ports do. What a reboot must forget (sockets, mounts, running
containers) lies under /run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TEMPLATES = HERE / "templates"
MODULES = HERE / "modules"


def cache_dir() -> Path:
    """$OCTAVO_CACHE, or octavo/ in the user's cache folder; the same rule as tools/setup.py."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    return Path(os.environ.get("OCTAVO_CACHE") or fallback)


@dataclass(frozen=True)
class State:
    """The folders of one control plane, or of the whole cluster. `run` is short: unix sockets."""

    root: Path
    run: Path

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "admin.kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        return self.run / "containerd.sock"

    def prepare(self) -> None:
        """Make the folders, readable by their owner only."""
        for folder in (self.root, self.run, self.logs, self.config):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


CLUSTER = State(Path("/var/lib/octavo-e2e"), Path("/run/octavo-e2e"))
LOCK = Path("/run/octavo-e2e.lock")
OWNER_FILE = CLUSTER.root / "owner"
IMAGES_LOCK = Path("/run/octavo-e2e-images.lock")
IMAGES_FILE = CLUSTER.root / "images.json"
