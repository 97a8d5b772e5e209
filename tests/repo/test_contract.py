"""What one half uses and the other defines, held together by reading both.

The operator writes the server's command line, its probes and reads its load; the chart starts the
operator; the CRD bounds what a user may ask of the server. No half imports the other, so a rename
on one side would be seen only in a cluster. Here it is seen in a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from octavo import errors
from octavo.api.lifecycle import Lifecycle, State
from octavo.api.load_report import load_report
from octavo.api.routes import build_app
from octavo.api.serving import Serving
from octavo.config import ServeConfig, parse_serve_args
from octavo.wire import Blocks, Failed, Load
from octavo_operator import cluster as api
from octavo_operator import config as configuration
from octavo_operator import resources, scraper, spec
from octavo_operator.autoscale import samples
from octavo_operator.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
CRD = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
ENGINE = SCHEMA["properties"]["spec"]["properties"]["engine"]["properties"]
Json = dict[str, Any]

EVERYTHING: Json = {
    "maxModelLen": 512,
    "blockSize": 32,
    "numKvBlocks": 77,
    "gpuMemoryUtilization": 0.5,
    "maxNumSeqs": 9,
    "maxNumBatchedTokens": 600,
    "dtype": "float32",
    "device": "cpu",
}


def with_defaults(value: Any, schema: Json) -> Any:
    """What the API server makes of an object: the schema's defaults filled in."""
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for key, child in schema.get("properties", {}).items():
        if key not in filled and "default" in child:
            filled[key] = child["default"]
        if key in filled:
            filled[key] = with_defaults(filled[key], child)
    return filled


def service(uri: str = "file:///opt/model", **engine: Any) -> spec.LLMService:
    body = {
        "metadata": {"name": "tiny", "namespace": "ns", "uid": "u", "generation": 1},
        "spec": {"model": {"uri": uri}, "engine": engine},
    }
    return spec.parse(with_defaults(body, SCHEMA))


def parsed(found: spec.LLMService) -> ServeConfig:
    """The server's own reading of the operator's command line."""
    command, *arguments = resources.server_args(found)
    assert command == "serve"
    return parse_serve_args(arguments)


def container() -> Json:
    deployment = resources.build_deployment(service(), 1, "image")
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


# The command line


def test_every_engine_field_of_the_schema_is_tried() -> None:
    not_arguments = {"image", "imagePullPolicy", "extraArgs", "env"}
    assert set(EVERYTHING) == set(ENGINE) - not_arguments


def test_every_field_arrives_at_the_server() -> None:
    config = parsed(service(**EVERYTHING, extraArgs=["--seed", "7"]))
    engine = config.engine
    assert engine.model == "/opt/model"
    assert config.served_model_names == ("tiny",)
    assert (config.host, config.port) == ("0.0.0.0", resources.PORT)
    assert (engine.device, engine.dtype, engine.seed) == ("cpu", "float32", 7)
    assert (engine.max_model_len, engine.block_size, engine.num_kv_blocks) == (512, 32, 77)
    assert engine.gpu_memory_utilization == 0.5
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (9, 600)


def test_the_drain_ends_before_the_grace_period() -> None:
    found = service()
    grace = found.spec.termination_grace_period_seconds
    assert 0 < parsed(found).drain_timeout <= grace - resources.PRE_STOP_SECONDS


def test_defaults_alone_are_a_valid_command_line() -> None:
    assert parsed(service()).engine.num_kv_blocks is None


@pytest.mark.parametrize(
    ("uri", "model", "source"),
    [
        ("file:///opt/model", "/opt/model", "auto"),
        ("pvc://claim/a/b", "/models/a/b", "auto"),
        ("pvc://claim", "/models", "auto"),
        ("hf://org/name@v1", "org/name@v1", "hub"),
    ],
)
def test_every_source_of_models_is_understood(uri: str, model: str, source: str) -> None:
    config = parsed(service(uri))
    assert (config.engine.model, config.source) == (model, source)


def boundaries() -> Iterator[tuple[str, Any]]:
    for field, schema in ENGINE.items():
        values = schema.get("enum", [])
        if field == "imagePullPolicy":
            continue
        for bound in ("minimum", "maximum"):
            if bound in schema:
                values = [*values, schema[bound]]
        yield from ((field, value) for value in values)


@pytest.mark.parametrize(("field", "value"), list(boundaries()))
def test_what_the_schema_allows_the_server_accepts(field: str, value: Any) -> None:
    """Or a manifest passes the API server and its pods die of their own command line."""
    parsed(service(**{field: value}))


def test_the_schema_keeps_users_from_the_operators_flags() -> None:
    (rule,) = (
        rule["rule"]
        for rule in ENGINE["extraArgs"]["x-kubernetes-validations"]
        if "matches" in rule["rule"]
    )
    pattern = re.search(r"a\.matches\('(.*)'\)", rule)
    assert pattern
    for uri in ("file:///opt/model", "hf://org/name"):
        for word in resources.server_args(service(uri, **EVERYTHING)):
            if word.startswith("--"):
                assert re.match(pattern[1], word), f"extraArgs may repeat {word}"


def test_the_container_runs_the_console_script() -> None:
    scripts = (ROOT / "pyproject.toml").read_text()
    (command,) = container()["command"]
    assert f'\n{command} = "octavo.cli:main"\n' in scripts


# HTTP


@pytest.fixture
def paths() -> set[str]:
    class NoEngine:
        in_flight = 0

    serving = Serving(parsed(service()), NoEngine())  # type: ignore[arg-type]
    try:
        routes = build_app(serving).routes
    finally:
        serving.close()
    return {getattr(route, "path", "") for route in routes}


def test_probes_ask_for_paths_that_exist(paths: set[str]) -> None:
    found = container()
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = found[kind]["httpGet"]
        assert probe["path"] in paths
        assert ports[probe["port"]] == resources.PORT


def test_the_load_is_read_where_it_is_served(paths: set[str]) -> None:
    assert scraper.LOAD_PATH in paths
    assert scraper.pod_url("10.0.0.1") == f"http://10.0.0.1:{resources.PORT}{scraper.LOAD_PATH}"


# GET /octavo/load


class Recorder(Mapping[str, Any]):
    """A document that notes which keys were asked for."""

    def __init__(self, document: Json, asked: set[str], path: str = "") -> None:
        self._document, self._asked, self._path = document, asked, path

    def __getitem__(self, key: str) -> Any:
        self._asked.add(f"{self._path}{key}")
        value = self._document[key]
        if isinstance(value, dict):
            return Recorder(value, self._asked, f"{self._path}{key}.")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)


def keys(document: Json, path: str = "") -> set[str]:
    found = {f"{path}{key}" for key in document}
    for key, value in document.items():
        if isinstance(value, dict):
            found |= keys(value, f"{path}{key}.")
    return found


def lifecycle() -> Lifecycle:
    return Lifecycle(hung_after=30)


def busy() -> Json:
    life = lifecycle()
    life.state = State.READY
    life.on_load(
        Load(
            blocks=Blocks(total=100, active=60, shared=5, cached=10, free=30),
            block_size=16,
            kv_utilization=0.6,
            demand_blocks={"now": 80, "10s": 90, "30s": 95, "60s": 99},
            seconds_to_exhaustion=4.0,
            running=5,
            waiting=2,
            waiting_blocks=20,
            prefill_backlog_s=0.1,
            step_budget_used=0.5,
            preemptions=0,
            steps=1,
            prompt_tokens=1,
            generation_tokens=1,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            last_activity=0.0,
        )
    )
    return load_report(life, in_flight=7)


def failed() -> Json:
    life = lifecycle()
    life.on_failed(Failed(reason="ModelInvalid", message="config.json is missing", retryable=False))
    return load_report(life, in_flight=0)


def test_the_operator_reads_only_keys_that_the_server_writes() -> None:
    for document in (busy(), failed()):
        asked: set[str] = set()
        samples.parse_load(Recorder(document, asked))
        assert asked
        assert asked <= keys(document), f"not in the server's report: {asked - keys(document)}"


def test_the_numbers_arrive() -> None:
    read = samples.parse_load(busy())
    assert (read.state, read.total_blocks, read.active_blocks) == ("Ready", 100, 60)
    assert read.waiting_blocks == 20


def test_a_failure_arrives_with_its_reason() -> None:
    failure = samples.parse_load(failed()).failure
    assert failure == samples.Failure("ModelInvalid", "config.json is missing")


def test_a_starting_server_is_understood() -> None:
    read = samples.parse_load(load_report(lifecycle(), in_flight=0))
    assert (read.state, read.total_blocks, read.failure) == ("Starting", 0, None)


def test_every_state_of_the_server_is_known_to_the_operator() -> None:
    assert {state.value for state in State} <= set(samples.STATES)


def test_every_reason_of_the_server_fits_a_condition() -> None:
    status = SCHEMA["properties"]["status"]["properties"]
    pattern = status["conditions"]["items"]["properties"]["reason"]["pattern"]
    reasons = [
        cls.reason
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.OctavoError)
    ]
    assert len(reasons) > 3
    for reason in reasons:
        assert re.fullmatch(pattern.strip("^$"), reason)


# Chart and operator


CHART = ROOT / "charts" / "octavo" / "templates"


def test_the_chart_starts_the_operator_as_it_wants_to_be_started() -> None:
    """Flags are parsed by the operator itself; environment variables are those that it reads."""
    template = (CHART / "deployment.yaml").read_text()
    flags = re.findall(r"- (--[a-z-]+)(?:=(\S+))?", template)
    values = {"--log-format": "json", "--http-port": "8081", "--namespace": "ns"}
    words = [f"{flag}={values[flag]}" if given else flag for flag, given in flags]
    config = configuration.load(words, env={"OCTAVO_SERVER_IMAGE": "image", "POD_NAME": "pod"})
    assert (config.namespaces, config.log_format, config.debug) == (("ns",), "json", True)
    assert (config.server_image, config.instance) == ("image", "pod")
    for name in ("OCTAVO_SERVER_IMAGE", "POD_NAME"):
        assert f"name: {name}\n" in template
    scripts = (ROOT / "pyproject.toml").read_text()
    assert "command: [octavo-operator]" in template
    assert '\noctavo-operator = "octavo_operator.__main__:main"\n' in scripts


def test_the_chart_probes_where_the_operator_answers() -> None:
    template = (CHART / "deployment.yaml").read_text()
    port = configuration.Config().http_port
    assert f"containerPort: {port}\n" in template
    assert f"--http-port={port}\n" in template
    paths = set(re.findall(r"path: (/\S+)", template))
    served = (ROOT / "operator" / "octavo_operator" / "app.py").read_text()
    assert paths
    assert all(f'add_get("{path}"' in served for path in paths)


def test_the_chart_allows_what_the_operator_asks_the_api_server_for() -> None:
    text = (CHART / "rbac.yaml").read_text().split('define "octavo.rules" -}}', 1)[1]
    rules = yaml.safe_load(text.split("{{-", 1)[0])
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    for kind, path in api.PATHS.items():
        parts = path.split("/")
        group = "" if parts[1] == "api" else parts[2]
        verbs = allowed[group, parts[-1]]
        # Events are created, the other kinds are watched and read.
        assert {"create"} == verbs if kind == "Event" else {"get", "list", "watch"} <= verbs
    for group, resource in (("apps", "deployments"), ("", "services")):
        assert {"create", "patch"} <= allowed[group, resource]
    assert "patch" in allowed["octavo.dev", "llmservices/status"]


def test_the_end_to_end_suite_reads_a_metric_that_exists() -> None:
    metrics = Metrics()
    metrics.api_writes.labels("Deployment", "apply").inc()
    name = "octavo_operator_api_writes_total"
    assert f'"{name}"' in (ROOT / "e2e" / "deployments.py").read_text()
    assert f"\n{name}{{" in generate_latest(metrics.registry).decode()
