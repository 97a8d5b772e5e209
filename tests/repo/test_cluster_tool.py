"""The cluster tool's decisions: whose process, whose rule, whose cluster, which key."""

import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import binaries, doctor, images, kernel, network, owner, processes, steps
from e2e.cluster.controlplane import Ports, free_port
from e2e.cluster.errors import ClusterError
from e2e.cluster.processes import MARK, NAME, Daemon, Process
from e2e.cluster.registry_server import Registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sleeper(tmp_path: Path):
    """A daemon that belongs to tmp_path; whatever the test did, it is gone afterwards."""
    daemon = Daemon("sleeper", (shutil.which("sleep") or "sleep", "30"))
    yield daemon
    processes.stop(processes.of_state(tmp_path), grace=0.1)


class TestProcesses:
    def test_a_process_is_ours_by_the_mark_in_its_environment(self, tmp_path: Path) -> None:
        proc = tmp_path / "proc"
        for pid, environ in {
            "10": f"{MARK}=/state\0{NAME}=etcd\0",
            "11": f"{MARK}=/elsewhere\0{NAME}=etcd\0",
            "12": "HOME=/root\0",
            "13": "",  # a zombie
        }.items():
            (proc / pid).mkdir(parents=True)
            (proc / pid / "environ").write_text(environ)
            (proc / pid / "cmdline").write_text("etcd\0--name=a b\0")
        (proc / "self").mkdir()
        found = processes.of_state(Path("/state"), proc)
        assert found == [Process(10, Path("/state"), "etcd", ("etcd", "--name=a b"))]

    def test_ensure_starts_once_and_replaces_another_command_line(
        self, tmp_path: Path, sleeper: Daemon
    ) -> None:
        assert processes.ensure(sleeper, tmp_path, tmp_path)
        first = processes.running(sleeper, tmp_path)
        assert first
        assert not processes.ensure(sleeper, tmp_path, tmp_path)
        changed = Daemon(sleeper.name, (sleeper.argv[0], "31"))
        assert processes.ensure(changed, tmp_path, tmp_path)
        assert processes.running(sleeper, tmp_path) is None
        assert [p.argv for p in processes.of_state(tmp_path)] == [changed.argv]

    def test_stop_ends_what_ignores_the_polite_signal(self, tmp_path: Path) -> None:
        code = "import signal,time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(30)"
        stubborn = Daemon("stubborn", (sys.executable, "-u", "-c", code))
        processes.ensure(stubborn, tmp_path, tmp_path)
        log = tmp_path / "stubborn.log"
        steps.wait_until(log.read_text, "its start", timeout=10, check=lambda: None)
        processes.stop(processes.of_state(tmp_path), grace=0.2)
        assert processes.of_state(tmp_path) == []

    def test_a_reused_number_is_never_signalled(self, tmp_path: Path) -> None:
        foreign = subprocess.Popen(["sleep", "30"])
        try:
            stale = Process(foreign.pid, tmp_path, "etcd", ("etcd",))
            processes.stop([stale], grace=0.1)
            assert foreign.poll() is None
        finally:
            foreign.send_signal(signal.SIGKILL)
            foreign.wait()

    def test_a_number_taken_by_another_of_our_own_is_not_signalled(
        self, tmp_path: Path, sleeper: Daemon
    ) -> None:
        processes.ensure(sleeper, tmp_path, tmp_path)
        found = processes.running(sleeper, tmp_path)
        assert found
        processes.stop([Process(found.pid, tmp_path, "etcd", ("etcd",))], grace=0.1)
        assert processes.running(sleeper, tmp_path) == found

    def test_a_daemon_that_ends_is_reported_with_its_log(self, tmp_path: Path) -> None:
        daemon = Daemon("doomed", (sys.executable, "-c", "raise SystemExit('no such disk')"))
        processes.ensure(daemon, tmp_path, tmp_path)
        check = processes.all_run([daemon], tmp_path, tmp_path)
        with pytest.raises(ClusterError, match=r"(?s)doomed ended while starting.*no such disk"):
            steps.wait_until(lambda: False, "never", timeout=20, check=check)


class TestOwner:
    def test_a_second_checkout_is_told_whose_the_cluster_is(self, tmp_path: Path) -> None:
        file, first, second = tmp_path / "owner", tmp_path / "one", tmp_path / "two"
        first.mkdir()
        owner.claim(file, first, take_over=False)
        with pytest.raises(ClusterError, match=f"{first}.*cli.py down.*--take-over"):
            owner.claim(file, second, take_over=False)
        assert file.read_text().strip() == str(first)
        owner.claim(file, second, take_over=True)
        assert file.read_text().strip() == str(second)

    def test_the_owner_may_come_again_and_a_vanished_one_is_succeeded(self, tmp_path: Path) -> None:
        file, gone = tmp_path / "state" / "owner", tmp_path / "gone"
        gone.mkdir()
        owner.claim(file, gone, take_over=False)
        owner.claim(file, gone, take_over=False)
        gone.rmdir()
        owner.claim(file, tmp_path, take_over=False)
        assert file.read_text().strip() == str(tmp_path)


class TestBinaries:
    def test_every_package_is_a_tool_of_its_pinned_module(self) -> None:
        for module in binaries.modules():
            text = (module.folder / "go.mod").read_text()
            assert (module.folder / "go.sum").exists()
            for package in module.packages.values():
                assert package == "." or package in text, f"{module.name}: {package}"

    def test_the_key_follows_pins_source_and_flags(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(binaries, "MODULES", tmp_path)
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "go.mod").write_text("module m")
        module = binaries.Module("m", {"m": "."})
        keys = [binaries.key(module)]
        (tmp_path / "m" / "notes.md").write_text("not an input")
        assert binaries.key(module) == keys[0]
        (tmp_path / "m" / "go.sum").write_text("a b")
        keys.append(binaries.key(module))
        (tmp_path / "m" / "main.go").write_text("package main")
        keys.append(binaries.key(module))
        keys.append(binaries.key(binaries.Module("m", {"m": "."}, ldflags="-s")))
        keys.append(binaries.key(binaries.Module("m", {"m": "."}, cgo=True)))
        assert len(set(keys)) == len(keys)

    def test_versions(self) -> None:
        assert binaries.go_version("go1.26.8\n") == (1, 26)
        assert binaries.go_version("devel +abc") is None
        assert binaries.go_version("go1.9") < binaries.MIN_GO < (2, 0)
        text = "require (\n\tk8s.io/kubernetes v1.36.3\n)\n"
        assert binaries.pinned_version(text, "k8s.io/kubernetes") == "v1.36.3"
        with pytest.raises(ClusterError, match="go mod tidy"):
            binaries.pinned_version(text, "k8s.io/kubernete")

    def test_without_go_the_sentence_says_where_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "no `go` on the PATH: install Go 1.26" in (binaries.missing_go() or "")
        old = tmp_path / "go"
        old.write_text("#!/bin/sh\necho go1.21.4\n")
        old.chmod(0o755)
        assert "is go1.21.4: install Go 1.26" in (binaries.missing_go() or "")

    def test_an_unknown_binary_is_named(self) -> None:
        with pytest.raises(ClusterError, match=r"no binary is called kubeadm; there are .*kubectl"):
            binaries.path("kubeadm")


class TestDoctor:
    def test_each_missing_program_is_named_with_its_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        missing = doctor.missing_packages()
        assert {"buildah", "iproute2", "iptables", "openssl"} <= set(missing)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(ClusterError, match=r"run `apt-get install -y .*buildah.*` as root"):
            doctor.install_packages()

    def test_not_root_is_refused_with_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert any("root is needed" in sentence for sentence in doctor.refusals())

    def test_every_probe_of_the_kernel_has_a_sentence(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "_works", lambda *command: False)
        sentences = " ".join(doctor.kernel_refusals())
        for word in ("bridge or veth", "network namespace", "nat table"):
            assert word in sentences


SAVED = r"""# Generated by iptables-save
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:MINE - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j MINE
-A FORWARD -o octavo0 -m comment --comment octavo-e2e -j ACCEPT
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A MINE -p tcp --dport 22 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
:CNI-0a1b - [0:0]
:CNI-ffff - [0:0]
-A POSTROUTING -s 10.244.0.10/32 -m comment --comment "name: \"octavo\" id: \"x\"" -j CNI-0a1b
-A POSTROUTING -s 10.9.0.10/32 -m comment --comment "name: \"theirs\" id: \"y\"" -j CNI-ffff
-A CNI-0a1b ! -d 224.0.0.0/4 -m comment --comment "name: \"octavo\" id: \"x\"" -j MASQUERADE
-A CNI-ffff -j MASQUERADE
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
COMMIT
"""


class TestNetwork:
    def test_only_our_rules_and_chains_are_removed(self) -> None:
        assert network.cleanup_script(SAVED).splitlines() == [
            "*filter",
            "-D FORWARD -o octavo0 -m comment --comment octavo-e2e -j ACCEPT",
            '-D FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
            "-F KUBE-FORWARD",
            "-F KUBE-SERVICES",
            "-X KUBE-FORWARD",
            "-X KUBE-SERVICES",
            "COMMIT",
            "*nat",
            r"-D POSTROUTING -s 10.244.0.10/32 -m comment --comment "
            r'"name: \"octavo\" id: \"x\"" -j CNI-0a1b',
            "-F CNI-0a1b",
            "-X CNI-0a1b",
            "COMMIT",
        ]

    def test_nothing_to_remove_is_no_script(self) -> None:
        assert network.cleanup_script("*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n") == ""

    def test_a_taken_port_is_replaced_by_a_free_one(self) -> None:
        import socket

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert free_port(port) != port

    def test_ports_survive_a_restart_and_a_torn_file(self, tmp_path: Path) -> None:
        file = tmp_path / "ports.json"
        assert Ports.load(file) is None
        Ports(1, 2, 3).save(file)
        assert Ports.load(file) == Ports(1, 2, 3)
        file.write_text('{"api": 1')
        assert Ports.load(file) is None


class TestKernel:
    def test_mounts_are_found_deepest_first_and_only_below_ours(self) -> None:
        info = "\n".join(
            f"1 1 0:1 / {point} rw - tmpfs tmpfs rw"
            for point in ("/", "/run/o", "/run/o/a", "/run/other", "/run/o/a/b", r"/run/o/c\040d")
        )
        found = kernel.mounts_below([Path("/run/o")], info)
        assert found == ["/run/o/c d", "/run/o/a/b", "/run/o/a"]

    def test_capabilities_are_read_from_the_effective_set(self) -> None:
        status = "CapPrm:\t000001ffffffffff\nCapEff:\t000001fffeffffff\n"
        assert not kernel.has_capability(status, kernel.CAP_SYS_RESOURCE)
        assert kernel.has_capability(status, kernel.CAP_SYS_RESOURCE + 1)


class TestImages:
    @staticmethod
    def checkout(root: Path, text: str = "print()") -> Path:
        (root / "server").mkdir(parents=True)
        (root / "server" / "a.py").write_text(text)
        (root / "Dockerfile").write_text("FROM scratch")
        return root

    def test_equal_content_is_one_tag_wherever_it_lies(self, tmp_path: Path) -> None:
        inputs = ("Dockerfile", "server")
        one, two = self.checkout(tmp_path / "one"), self.checkout(tmp_path / "two")
        (two / "server" / "__pycache__").mkdir()
        (two / "server" / "__pycache__" / "a.pyc").write_text("x")
        os.utime(two / "Dockerfile", (1, 1))
        tag = images.content_tag(one, inputs, "base")
        assert images.content_tag(two, inputs, "base") == tag
        assert images.content_tag(two, inputs, "other base") != tag
        assert images.content_tag(self.checkout(tmp_path / "3", "x"), inputs, "base") != tag

    def test_a_snapshot_holds_the_inputs_only_with_fixed_times_and_modes(
        self, tmp_path: Path
    ) -> None:
        source = self.checkout(tmp_path / "source")
        (source / "secret").write_text("not an input")
        (source / "server" / "a.py").chmod(0o600)
        target = tmp_path / "context"
        images.snapshot(source, ("Dockerfile", "server"), target)
        found = {str(p.relative_to(target)) for p in target.rglob("*")}
        assert found == {"Dockerfile", "server", "server/a.py"}
        seen = (target / "server" / "a.py").stat()
        assert (seen.st_mtime, seen.st_mode & 0o777) == (images.MOMENT, 0o644)

    def test_the_inputs_cover_what_the_dockerfile_copies(self) -> None:
        copied = {
            source
            for line in (ROOT / "Dockerfile").read_text().splitlines()
            if line.startswith("COPY ") and "--from" not in line
            for source in line.split()[1:-1]
        }
        for source in copied:
            covering = {name for inputs in images.INPUTS.values() for name in inputs}
            assert any(Path(source).is_relative_to(name) for name in covering), source

    def test_a_missing_input_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match="Dockerfile is missing"):
            images.content_tag(tmp_path, ("Dockerfile",))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Callable[..., tuple[int, dict[str, str], bytes]]]:
    """Ask a registry that keeps its files in tmp_path."""

    def ask(method: str, path: str, body: Any = None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    server = Registry(0, tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield ask
    server.shutdown()
    server.server_close()
    thread.join()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class TestRegistry:
    def test_a_blob_comes_in_pieces_and_goes_out_whole(self, registry) -> None:
        content = os.urandom(3_000_000)
        _, headers, _ = registry("POST", "/v2/a/b/blobs/uploads/")
        # An iterator makes the client use chunked framing, as buildah does.
        half = iter([content[:1_000_001], content[1_000_001:2_000_000]])
        status, headers, _ = registry("PATCH", headers["Location"], half)
        assert (status, headers["Range"]) == (202, "0-1999999")
        place = f"{headers['Location']}?digest={digest_of(content)}"
        assert registry("PUT", place, content[2_000_000:])[0] == 201
        status, headers, body = registry("GET", f"/v2/a/b/blobs/{digest_of(content)}")
        assert (status, body) == (200, content)
        status, headers, body = registry("HEAD", f"/v2/other/blobs/{digest_of(content)}")
        assert (status, headers["Content-Length"], body) == (200, "3000000", b"")
        mount = f"/v2/c/blobs/uploads/?mount={digest_of(content)}&from=a/b"
        assert registry("POST", mount)[0] == 201

    def test_a_blob_that_is_not_what_it_says_is_refused(self, registry, tmp_path: Path) -> None:
        _, headers, _ = registry("POST", "/v2/a/blobs/uploads/")
        place = f"{headers['Location']}?digest={digest_of(b'promised')}"
        status, _, body = registry("PUT", place, b"delivered")
        assert (status, json.loads(body)["errors"][0]["code"]) == (400, "DIGEST_INVALID")
        assert registry("HEAD", f"/v2/a/blobs/{digest_of(b'promised')}")[0] == 404
        assert list((tmp_path / "uploads").iterdir()) == []

    def test_tags_are_read_from_disk(self, registry, tmp_path: Path) -> None:
        kind = "application/vnd.oci.image.manifest.v1+json"
        body = b'{"schemaVersion": 2}'
        path = "/v2/a/b/manifests/dev"
        assert registry("PUT", path, body, **{"Content-Type": kind})[0] == 201
        assert len(list((tmp_path / "tags").iterdir())) == 2
        for name in ("dev", digest_of(body)):
            status, headers, found = registry("GET", f"/v2/a/b/manifests/{name}")
            assert (status, headers["Content-Type"], found) == (200, kind, body)
        assert registry("GET", "/v2/a/b/manifests/other")[0] == 404

    def test_no_name_leads_out_of_its_folder(self, registry, tmp_path: Path) -> None:
        for path in ("/v2/../x/manifests/dev", "/v2/a/manifests/../../x", "/v2/a/blobs/x"):
            assert registry("PUT", path, b"{}")[0] == 404
        assert not (tmp_path.parent / "x").exists()


def test_steps_are_printed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "steps.jsonl"
    monkeypatch.setenv("OCTAVO_STEPS", str(file))
    with steps.step("one"):
        pass
    with pytest.raises(ClusterError), steps.step("two"):
        raise ClusterError("no")
    rows = file.read_text().splitlines()
    assert ['"done"' in rows[0], '"failed"' in rows[1]] == [True, True]
    said = capsys.readouterr()
    assert said.out == ""
    assert "one" in said.err
