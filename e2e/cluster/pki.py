"""Certificates and kubeconfigs of one cluster, made by openssl; one identity for each component.

Elliptic-curve keys: all of them take a third of a second. The folder appears whole or not at all.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

from e2e.cluster.errors import ClusterError

DAYS = "3650"
EC = ("-pkeyopt", "ec_paramgen_curve:prime256v1")
NODE = "octavo"
# name → subject. The groups are those that Kubernetes' built-in roles are bound to.
CLIENTS = {
    "admin": "/O=system:masters/CN=admin",
    "kubelet-client": "/O=system:masters/CN=kube-apiserver-kubelet-client",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "kubelet": f"/O=system:nodes/CN=system:node:{NODE}",
    "kube-proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=octavo:coredns",
}
API_NAMES = (
    "IP:127.0.0.1,IP:10.96.0.1,IP:10.244.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,"
    "DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
)


def _openssl(folder: Path, *args: str) -> None:
    done = subprocess.run(["openssl", *args], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"openssl {' '.join(args)}: exit {done.returncode}\n{done.stderr}")


def _issue(folder: Path, name: str, subject: str, *extensions: str) -> None:
    """A key and a certificate signed by the cluster's own authority."""
    extra = [part for extension in extensions for part in ("-addext", extension)]
    _openssl(
        folder, "req", "-x509", "-CA", "ca.crt", "-CAkey", "ca.key", "-newkey", "ec", *EC, "-nodes",
        "-keyout", f"{name}.key", "-out", f"{name}.crt", "-days", DAYS, "-subj", subject,
        "-addext", "basicConstraints=critical,CA:FALSE", *extra,
    )  # fmt: skip


def create(folder: Path) -> None:
    """Make everything unless it is there."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    _openssl(
        partial, "req", "-x509", "-newkey", "ec", *EC, "-nodes", "-keyout", "ca.key",
        "-out", "ca.crt", "-days", DAYS, "-subj", "/CN=octavo-e2e",
        "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
    )  # fmt: skip
    _openssl(partial, "genpkey", "-algorithm", "EC", *EC, "-out", "service-accounts.key")
    _openssl(
        partial, "pkey", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub"
    )
    _issue(partial, "apiserver", "/CN=kube-apiserver", f"subjectAltName={API_NAMES}")
    _issue(partial, "kubelet-server", f"/CN={NODE}", f"subjectAltName=IP:10.244.0.1,DNS:{NODE}")
    for name, subject in CLIENTS.items():
        _issue(partial, name, subject, "extendedKeyUsage=clientAuth")
    partial.rename(folder)


def kubeconfig(folder: Path, client: str, server: str) -> str:
    """A self-contained kubeconfig. JSON is YAML, and the standard library writes JSON."""

    def inline(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "octavo-e2e",
        "clusters": [
            {
                "name": "octavo-e2e",
                "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")},
            }
        ],
        "users": [
            {
                "name": client,
                "user": {
                    "client-certificate-data": inline(f"{client}.crt"),
                    "client-key-data": inline(f"{client}.key"),
                },
            }
        ],
        "contexts": [{"name": "octavo-e2e", "context": {"cluster": "octavo-e2e", "user": client}}],
    }
    return json.dumps(content, indent=1) + "\n"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode=0o600)
    partial.chmod(0o600)
    partial.write_text(text)
    os.replace(partial, path)
