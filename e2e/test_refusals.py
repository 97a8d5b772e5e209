"""What cannot be served is refused with a sentence that says what to change."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import Bench, manifest
from kube import ROOT, ClusterError, restarts, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

BAD_MANIFESTS = sorted((ROOT / "docs" / "examples" / "bad").glob("*.yaml"))
MODEL = ROOT / "e2e" / "tinymodel" / "model"
CLAIM = "models"

# Folder → words that the condition must hold: the file and what is wrong with it.
BAD_MODELS = {
    "unsupported-architecture": ("config.json", "MambaForCausalLM"),
    "truncated-weights": ("model.safetensors", ""),
    "missing-tokenizer": ("tokenizer.json", ""),
}


def test_there_are_ten_bad_manifests() -> None:
    assert len(BAD_MANIFESTS) >= 10


@pytest.mark.parametrize("path", BAD_MANIFESTS, ids=lambda path: path.stem)
def test_bad_manifests_are_refused_with_their_sentence(bench: Bench, path: Path) -> None:
    expected = path.read_text().splitlines()[0].removeprefix("# Expected: ")
    with pytest.raises(ClusterError) as refused:
        bench.cluster.kubectl("apply", "--namespace", bench.namespace, "-f", str(path))
    assert expected in str(refused.value)


def spoil(folder: Path) -> None:
    """Three copies of the tiny model, each with one thing wrong."""
    for name in BAD_MODELS:
        shutil.copytree(MODEL, folder / name)
    config = folder / "unsupported-architecture" / "config.json"
    found = json.loads(config.read_text())
    found.update(architectures=["MambaForCausalLM"], model_type="mamba")
    config.write_text(json.dumps(found))
    weights = folder / "truncated-weights" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    (folder / "missing-tokenizer" / "tokenizer.json").unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture(scope="module")
def spoilt_models(bench: Bench) -> Iterator[str]:
    """A claim of the namespace on a folder of this machine; its name."""
    if not bench.cluster.own:
        pytest.skip("puts folders on the node's disk, which only our own one-node cluster shares")
    folder = Path(tempfile.mkdtemp(prefix="octavo-e2e-models-", dir="/var/tmp"))
    spoil(folder)
    volume = f"{bench.namespace}-models"
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    objects = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(folder), "type": "Directory"},
                "claimRef": {"namespace": bench.namespace, "name": CLAIM},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": bench.namespace},
            "spec": {**claim, "volumeName": volume},
        },
    ]
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    bench.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed))
    yield CLAIM
    bench.cluster.kubectl("delete", "llmsvc", "--all", "--namespace", bench.namespace)
    for name in bench.services:
        wait_until(lambda name=name: not bench.pods(name), f"{name} is gone", timeout=90)
    bench.cluster.kubectl("delete", "pvc", CLAIM, "--namespace", bench.namespace)
    bench.cluster.kubectl("delete", "pv", volume)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bad_services(bench: Bench, spoilt_models: str) -> list[str]:
    """All three at once: their starts take the same seconds."""
    return [
        bench.apply(manifest(folder, f"pvc://{spoilt_models}/{folder}", replicas=1))
        for folder in BAD_MODELS
    ]


@pytest.mark.parametrize("folder", BAD_MODELS)
def test_a_bad_model_is_named_in_the_condition(
    bench: Bench, bad_services: list[str], folder: str
) -> None:
    """The condition has the file's name, the pod runs on without a restart, describe shows it."""
    file, word = BAD_MODELS[folder]

    def told() -> bool:
        stalled = bench.condition(folder, "Stalled")
        return stalled.get("status") == "True" and file in stalled["message"]

    wait_until(told, f"a Stalled condition of {folder} that names {file}", timeout=90)
    ready, stalled = bench.condition(folder, "Ready"), bench.condition(folder, "Stalled")
    assert ready["status"] == "False"
    assert file in ready["message"]
    assert word in stalled["message"]
    (pod,) = bench.pods(folder)
    assert pod["status"]["phase"] == "Running"
    assert restarts(pod) == 0
    shown = bench.cluster.kubectl("describe", "llmsvc", folder, "--namespace", bench.namespace)
    assert stalled["message"][:60] in " ".join(shown.split())
