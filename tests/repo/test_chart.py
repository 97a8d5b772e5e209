"""The chart: one CRD, no wildcard, nothing that the restricted standard forbids.

What is text is read as text. What helm has to render is marked `apiserver`, because helm is built
with the API server's binaries; without helm those tests fail, they do not skip.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "octavo"
Json = dict[str, Any]


def helm() -> str:
    """The helm that HELM names, that is on the path, or that the cluster tool has built."""
    named = os.environ.get("HELM") or shutil.which("helm")
    if not named:
        tool = ["python3", str(ROOT / "e2e" / "cluster" / "cli.py"), "binary", "helm"]
        found = subprocess.run(tool, capture_output=True, text=True)
        named = found.stdout.strip()
    assert named, "no helm: set HELM, or build it with `python3 e2e/cluster/cli.py binaries`"
    return named


def run_helm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *args], capture_output=True, text=True, timeout=60)


def render(*settings: str) -> list[Json]:
    flags = [part for setting in settings for part in ("--set", setting)]
    done = run_helm("template", "octavo", str(CHART), "--namespace", "octavo-system", *flags)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def of_kind(objects: list[Json], kind: str) -> list[Json]:
    return [found for found in objects if found["kind"] == kind]


def rules(objects: list[Json]) -> list[Json]:
    roles = of_kind(objects, "ClusterRole") + of_kind(objects, "Role")
    return [rule for role in roles for rule in role["rules"]]


def test_crd_is_a_byte_for_byte_copy() -> None:
    copy = CHART / "files" / "llmservice.yaml"
    source = ROOT / "crds" / "llmservice.yaml"
    assert copy.read_bytes() == source.read_bytes(), "run: make crds"


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value: Json, node: Json, path: str) -> None:
        assert node["additionalProperties"] is False, f"{path} is open"
        known = set(node["properties"]) - {"global"}
        for key, found in value.items():
            assert key in known, f"{path}.{key} is not in the schema"
            child = node["properties"][key]
            if isinstance(found, dict) and "properties" in child:
                compare(found, child, f"{path}.{key}")
        optional = {"claims"}  # a container's resources may hold it, we have none
        assert known - set(value) <= optional, f"{path}: no default for {known - set(value)}"

    compare(values, schema, "values")


@pytest.mark.apiserver
def test_lint_is_clean() -> None:
    done = run_helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.apiserver
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("operator.imge=x", "imge"),
        ("replicas=2", "replicas"),
        ("operator.logFormat=loud", "logFormat"),
        ("networkPolicy.apiServerPorts={70000}", "apiServerPorts"),
        ("server.image=", "image"),
    ],
)
def test_wrong_values_are_refused_by_name(setting: str, named: str) -> None:
    done = run_helm("template", "octavo", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.apiserver
def test_rendered_crd_equals_the_source() -> None:
    source = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
    (dropped,) = of_kind(render("crds.keep=false"), "CustomResourceDefinition")
    assert dropped == source
    (kept,) = of_kind(render(), "CustomResourceDefinition")
    assert kept["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert kept == source
    assert of_kind(render("crds.install=false"), "CustomResourceDefinition") == []


@pytest.mark.apiserver
@pytest.mark.parametrize("settings", [(), ("operator.watchNamespaces={a,b}",)])
def test_rbac_has_no_wildcard_and_no_way_up(settings: tuple[str, ...]) -> None:
    found = rules(render(*settings))
    assert found
    for rule in found:
        words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "*" not in words
        assert not words & {"secrets", "pods/exec", "escalate", "bind", "impersonate"}, rule


@pytest.mark.apiserver
def test_operator_may_not_write_what_the_user_owns() -> None:
    (role,) = (r for r in of_kind(render(), "ClusterRole") if r["metadata"]["name"] == "octavo")
    verbs = {
        verb
        for rule in role["rules"]
        if "llmservices" in rule["resources"]
        for verb in rule["verbs"]
    }
    assert verbs == {"get", "list", "watch"}


@pytest.mark.apiserver
def test_named_namespaces_get_roles_and_no_cluster_role() -> None:
    objects = render("operator.watchNamespaces={a,b}", "rbac.aggregate=false")
    assert of_kind(objects, "ClusterRole") == of_kind(objects, "ClusterRoleBinding") == []
    assert [role["metadata"]["namespace"] for role in of_kind(objects, "Role")] == ["a", "b"]
    for binding in of_kind(objects, "RoleBinding"):
        assert binding["subjects"][0]["namespace"] == "octavo-system"


@pytest.mark.apiserver
def test_people_get_their_roles_through_the_clusters_own() -> None:
    labels = {
        role["metadata"]["name"]: sorted(
            label.rsplit("/", 1)[1]
            for label in role["metadata"]["labels"]
            if label.startswith("rbac.authorization.k8s.io/aggregate-to-")
        )
        for role in of_kind(render(), "ClusterRole")
    }
    assert labels["octavo-viewer"] == ["aggregate-to-view"]
    assert labels["octavo-editor"] == ["aggregate-to-edit"]
    assert labels["octavo-admin"] == ["aggregate-to-admin"]
    assert labels["octavo"] == []


@pytest.mark.apiserver
def test_operator_pod_meets_the_restricted_standard() -> None:
    (deployment,) = of_kind(render("server.image=r/s:1"), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["enableServiceLinks"] is False
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(container)
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["OCTAVO_SERVER_IMAGE"] == "r/s:1"


@pytest.mark.apiserver
def test_selectors_match_the_operator_and_never_a_server() -> None:
    objects = render("networkPolicy.enabled=true")
    (deployment,) = of_kind(objects, "Deployment")
    (policy,) = of_kind(objects, "NetworkPolicy")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"], policy["spec"]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()
        assert selector["matchLabels"]["app.kubernetes.io/name"] != "octavo-server"


@pytest.mark.apiserver
def test_notes_lead_on(tmp_path: Path) -> None:
    """The manifest that the notes tell a user to apply is the API's own."""
    done = run_helm("install", "octavo", str(CHART), "--dry-run=client", "-n", "octavo-system")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:", 1)[1]
    assert notes.count("kubectl ") >= 3
    manifest = notes.split("<<EOF\n", 1)[1].split("     EOF", 1)[0]
    found = yaml.safe_load(manifest)
    assert found["kind"] == "LLMService"
    assert found["spec"]["model"]["uri"].startswith("file:///")
