"""`octavo-operator` as it runs in the cluster: its own process, with the chart's rights only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver_bench import DEPLOYMENTS, LLMSERVICES, ROOT, Kube, eventually

Json = dict[str, Any]
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PATHS = {
    "ClusterRole": f"{RBAC}/clusterroles",
    "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
    "Role": f"{RBAC}/namespaces/{{ns}}/roles",
    "RoleBinding": f"{RBAC}/namespaces/{{ns}}/rolebindings",
    "ServiceAccount": "/api/v1/namespaces/{ns}/serviceaccounts",
}


def helm() -> str:
    """The helm that HELM names, that is on the path, or that the cluster tool has built."""
    found = os.environ.get("HELM") or shutil.which("helm")
    if not found:
        tool = [sys.executable, str(ROOT / "e2e" / "cluster" / "cli.py"), "binary", "helm"]
        found = subprocess.run(tool, capture_output=True, text=True, check=True).stdout.strip()
    return found


def render(release: str, namespace: str, *settings: str) -> list[Json]:
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [helm(), "template", release, str(ROOT / "charts" / "octavo")]
    done = subprocess.run(
        [*command, "--namespace", namespace, *flags], capture_output=True, text=True, check=True
    )
    return [found for found in yaml.safe_load_all(done.stdout) if found]


class Process:
    """The command in a process of its own."""

    def __init__(self, kubeconfig: Path, log: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "octavo_operator", f"--http-port={self.port}", *flags]
        environment = {
            **os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": str(ROOT / "operator"),
            "OCTAVO_SERVER_IMAGE": "octavo-server:test",
        }  # fmt: skip
        self.log = log
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(command, env=environment, stderr=stream)

    def read(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def end(self) -> tuple[int, float]:
        """Exit code and seconds after SIGTERM."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(20)
        finally:
            self._process.kill()
        return code, time.monotonic() - began


class Rights:
    """The chart's service account and roles in the test's namespace, and a kubeconfig for them."""

    def __init__(self, kube: Kube, folder: Path) -> None:
        self._kube, self._folder = kube, folder
        self._made: list[tuple[str, str]] = []

    def grant(self, *settings: str) -> Path:
        kube = self._kube
        objects = render(kube.namespace, kube.namespace, *settings)
        account = ""
        for found in objects:
            if path := PATHS.get(found["kind"]):
                # Roles that users' roles aggregate are not the operator's.
                if "aggregationRule" in found or "aggregate-to" in str(found["metadata"]):
                    continue
                kube.call("POST", path, found)
                self._made.append((path, found["metadata"]["name"]))
                if found["kind"] == "ServiceAccount":
                    account = found["metadata"]["name"]
        assert account
        path = f"{PATHS['ServiceAccount']}/{account}/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        return self._kubeconfig(kube.call("POST", path, request)["status"]["token"])

    def _kubeconfig(self, token: str) -> Path:
        config = yaml.safe_load(self._kube.kubeconfig.read_text())
        config["users"] = [{"name": user["name"], "user": {"token": token}}
                           for user in config["users"]]  # fmt: skip
        path = self._folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path

    def revoke(self) -> None:
        for path, name in self._made:
            self._kube.delete(path, name)


@pytest.fixture
def rights(kube: Kube, tmp_path: Path) -> Iterator[Rights]:
    found = Rights(kube, tmp_path)
    yield found
    found.revoke()


@pytest.mark.parametrize("scope", ["cluster", "namespace"])
def test_the_charts_rights_are_enough(
    kube: Kube, rights: Rights, tmp_path: Path, scope: str
) -> None:
    """From a new object to its children, Ready and back; nothing forbidden on the way."""
    settings, flags = [], ["--log-format=json"]
    if scope == "namespace":
        settings.append(f"operator.watchNamespaces={{{kube.namespace}}}")
        flags.append(f"--namespace={kube.namespace}")
    process = Process(rights.grant(*settings), tmp_path / "log", *flags)
    try:
        eventually(lambda: process.read("/healthz") == "ok\n", 20, "healthy")
        kube.service({"autoscaling": {"max": 3}})
        eventually(lambda: kube.replicas() == 1, 20, "children")
        kube.roll(1)
        eventually(lambda: kube.condition("Ready").get("status") == "True", what="Ready")
        # A Stalled service tells so by an Event.
        kube.service({"tolerations": [{"operator": "Exists", "value": "x"}]}, name="bad")
        eventually(lambda: "ApplyRefused" in kube.events(), what="an Event")
        kube.delete(LLMSERVICES, "tiny")
        assert kube.get(LLMSERVICES, "tiny") is None
        text = process.read("/metrics")
        assert 'octavo_operator_api_writes_total{kind="Deployment",verb="apply"}' in text
    finally:
        code, seconds = process.end()
    log = process.log.read_text()
    assert (code, seconds < 3) == (0, True), log
    for line in log.splitlines():
        entry = json.loads(line)
        text = entry["message"]
        # What the API server refuses of the second service is a matter of content, not of rights.
        assert "forbidden" not in text.lower(), line
        assert "permission" not in text.lower(), line
        assert "Traceback" not in text, line


def test_an_unreachable_api_server_is_waited_for(tmp_path: Path, kube: Kube) -> None:
    """No crash loop: the process lives on and tries again."""
    config = yaml.safe_load(kube.kubeconfig.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for found in config["clusters"]:
        found["cluster"]["server"] = f"https://127.0.0.1:{port}"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    process = Process(path, tmp_path / "log")
    try:
        eventually(lambda: process.read("/healthz") == "ok\n", 20, "healthy")
        time.sleep(3)
        assert process.read("/healthz") == "ok\n"
    finally:
        code, seconds = process.end()
    assert (code, seconds < 8) == (0, True), process.log.read_text()


def test_a_taken_port_ends_the_process_with_a_reason(kube: Kube, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "octavo_operator", f"--http-port={port}"]
        environment = {
            **os.environ, "KUBECONFIG": str(kube.kubeconfig), "PYTHONPATH": str(ROOT / "operator")
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert kube.list(DEPLOYMENTS) == []
